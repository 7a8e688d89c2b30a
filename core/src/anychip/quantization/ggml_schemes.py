"""GGUF's block types as schemes: which one holds a type as the file does, which one holds several types together, and
the canonical parts of rows in a scheme. Every scheme gives a type's weights bit for bit as ggml computes them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from anychip.gguf.block_types import RARE, BlockType
from anychip.plugin_api import NAMED, QuantScheme
from anychip.weights.blocks import Blocks, unpack

AT_LOAD = NAMED["int8"]
"""Of rare types: rounded to one scale for a row."""

SCHEME_OF: dict[str, QuantScheme] = {
    "Q4_0": NAMED["f16-int4"],
    "Q4_1": NAMED["f16-int4-minima"],
    "Q5_0": NAMED["f16-int5"],
    "Q5_1": NAMED["f16-int5-minima"],
    "Q8_0": NAMED["f16-int8"],
    "Q2_K": NAMED["super-int2-minima"],
    "Q3_K": NAMED["super-int3"],
    "Q4_K": NAMED["super-int4-minima"],
    "Q5_K": NAMED["super-int5-minima"],
    "Q6_K": NAMED["super-int6"],
    "IQ4_NL": NAMED["f16-codebook4"],
    "IQ4_XS": NAMED["super-codebook4"],
    "MXFP4": NAMED["mxfp4"],
    **dict.fromkeys(RARE, AT_LOAD),
}
"""By a block type's name."""

_SMALL = ("int2", "int3", "int4")


def scheme_of_all(types: Collection[str | None]) -> QuantScheme | None:
    """The one scheme of matrices that are one product; None stands for a plain one, and for plain ones the result.
    Files often store one of an expert's matrices finer than the others."""
    if None in types:
        return None
    schemes = [SCHEME_OF[name] for name in types if name is not None]
    if AT_LOAD in schemes or all(scheme == schemes[0] for scheme in schemes):
        return AT_LOAD if AT_LOAD in schemes else schemes[0]
    # Every type's numbers are integers of eight bits, of some kinds four bits too.
    values = "int4" if all(scheme.values in _SMALL for scheme in schemes) else "int8"
    return replace(NAMED[f"{values}-minima"], group_size=min(scheme.group_size or 32 for scheme in schemes))


def parts_of(stored: BlockType, rows: Tensor, scheme: QuantScheme) -> dict[str, Tensor]:
    """`rows` uint8 [n, bytes of a row]; `scheme` the type's own or one of several types'. By kind, with "" for values:
    the canonical parts of whole rows, [n, columns], [n, groups] or [n, super-groups]."""
    blocks = unpack(stored, rows)
    if scheme == SCHEME_OF[stored.name]:
        given: dict[str, Tensor | None] = {
            "": blocks.codes, "scale": blocks.scale, "super_scale": blocks.super_scale, "minimum": blocks.minimum,
            "super_minimum": blocks.super_minimum,
        }  # fmt: skip
    else:
        given = _together(blocks, scheme)
    return {kind: part.reshape(len(rows), -1) for kind, part in given.items() if part is not None}


def _together(blocks: Blocks, scheme: QuantScheme) -> dict[str, Tensor | None]:
    """Of a scheme with minima and float32 scales."""
    values, scale, minimum = blocks.integers(), blocks.scales, blocks.minima
    if (
        minimum is None and scheme.values == "int4"
    ):  # unsigned, with a minimum of as many scales as the least is below 0
        values, minimum = values + blocks.offset, blocks.offset * scale
    elif minimum is None:
        minimum = torch.zeros_like(scale)
    assert scheme.group_size is not None, scheme.name
    repeated = values.shape[1] // scale.shape[1] // scheme.group_size
    if repeated > 1:
        scale, minimum = (held.repeat_interleave(repeated, dim=1) for held in (scale, minimum))
    return {"": values.view(torch.uint8) if scheme.values == "int4" else values, "scale": scale, "minimum": minimum}
