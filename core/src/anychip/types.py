"""Names for the plain numbers and strings that cross modules. Owns no behaviour but dtype arithmetic."""

from __future__ import annotations

from typing import Literal, NewType, get_args

RequestId = NewType("RequestId", str)
BlockId = NewType("BlockId", int)
Slot = NewType("Slot", int)
"""A request's row in the workers' persistent batch, 0 <= slot < max_num_seqs, held while it runs."""

DType = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "int8"]
DTYPES: tuple[str, ...] = get_args(DType)

FinishReason = Literal["stop", "length", "abort"]

QUICKSTART = "quickstart"
"""The model name that stands for the embedded checkpoint."""

NULL_BLOCK = BlockId(0)
"""The block that no request owns: what a block table holds where a window has passed, or a row is padding."""

PADDING_SLOT = -1
"""What a slot mapping holds for a token whose key and value must not be written."""

MAX_LOGPROBS = 20
"""Most likely tokens that a step reports for a row, whatever fewer a request asked for."""

MAX_BIASES = 1024
"""Tokens of one request whose logits may be biased."""

_ITEMSIZE = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
}


def itemsize(dtype: DType) -> int:
    """Bytes of one element."""
    return _ITEMSIZE.get(dtype, 1)


def cdiv(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)
