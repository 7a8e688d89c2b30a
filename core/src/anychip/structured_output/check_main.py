"""The child of GrammarChecker: compiles each grammar that it reads, and one mask, and says what is wrong."""

from __future__ import annotations

import resource
import sys

import msgspec
import numpy as np

from anychip.errors import InvalidRequest
from anychip.sampling_params import StructuredOutput
from anychip.structured_output.checker import CheckerSpec
from anychip.structured_output.grammar import refusal
from anychip.structured_output.processor import GrammarCompiler
from anychip.types import cdiv

_MAX_MEMORY = 4 * 2**30


def main() -> None:
    """Serves standard input until it closes."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=CheckerSpec)
    compiler = GrammarCompiler(
        lambda: spec.tokenizer_json, vocab_size=spec.vocab_size, eos_token_ids=spec.eos_token_ids
    )
    answer("")
    mask = np.zeros(cdiv(spec.vocab_size, 32), dtype=np.uint32)
    for line in iter(sys.stdin.buffer.readline, b""):
        answer(problem(compiler, msgspec.json.decode(line, type=StructuredOutput), mask))


def problem(compiler: GrammarCompiler, wanted: StructuredOutput, mask: np.ndarray) -> str:
    """What is wrong with a grammar; "" for nothing."""
    try:
        matcher = compiler.matcher(wanted)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            raise refusal(wanted, matcher.get_error())
    except InvalidRequest as error:
        return str(error)
    return ""


def answer(text: str) -> None:
    """One line to the parent."""
    sys.stdout.buffer.write(msgspec.json.encode(text) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
