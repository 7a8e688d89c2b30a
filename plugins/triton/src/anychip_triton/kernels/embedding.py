"""Rows of an embedding."""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier


@triton.jit
def embedding(
    out,  # [tokens, width]
    ids,  # [tokens]
    weight,  # [rows, width]
    first,  # the id of weight's first row
    rows,
    width,
    stride,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Zeros for an id that `weight` does not hold."""
    if CHAINED:
        after_earlier()
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64) - first
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    held = (row >= 0) & (row < rows)
    values = tl.load(weight + row * stride + at, mask=inside & held, other=0.0)
    tl.store(out + token * width + at, values, mask=inside)
