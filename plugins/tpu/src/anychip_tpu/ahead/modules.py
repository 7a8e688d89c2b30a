"""What torch_xla's export leaves out of a StableHLO text, written into it: shardings and donations of arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping


def with_shardings(text: str) -> str:
    """The first annotation of an argument is written on it, so that it is no choice of the partitioner's."""
    found = re.findall(r"@Sharding\(%arg(\d+)\)[^\n]*?mhlo\.sharding = \"([^\"]*)\"", text)
    shardings: dict[str, str] = {}
    for argument, sharding in found:
        shardings.setdefault(argument, sharding)
    end = text.index(") -> ", text.index("@main("))

    def annotated(match: re.Match[str]) -> str:
        sharding = shardings.get(match[1])
        return match[0] if sharding is None else f'{match[0]} {{mhlo.sharding = "{sharding}"}}'

    return re.sub(r"%arg(\d+): tensor<[^>]*>", annotated, text[:end]) + text[end:]


def with_donations(text: str, donated: Mapping[int, int]) -> str:
    """Says on the arguments of main which output takes their memory: torch_xla's export leaves that out."""
    begin = text.index("func.func public @main(" if "func.func public @main(" in text else "func.func @main(")
    head, signature, rest = text[:begin], *_split_signature(text[begin:])
    # Attributes of torch_xla's module that an MLIR of another version does not read.
    head = re.sub(r"mhlo\.(cross_program_prefetches|input_output_alias) = \[\], ", "", head)
    for argument, output in donated.items():
        pattern = rf"(%arg{argument}: tensor<[^>]*>)( \{{)?"
        alias = f"tf.aliasing_output = {output} : i32"
        signature = re.sub(
            pattern, lambda m, alias=alias: f"{m[1]} {{{alias}{', ' if m[2] else '}'}", signature, count=1
        )
    return head + signature + rest


def _split_signature(text: str) -> tuple[str, str]:
    """A function's arguments, and what follows."""
    end = text.index(") -> ")
    return text[:end], text[end:]
