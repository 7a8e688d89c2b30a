"""Gate and up of the same activations, which are read once."""

import triton
import triton.language as tl

from anychip_triton.kernels.numbers import dot


@triton.jit
def accumulate_both(
    x,
    x_at,  # [BLOCK_M] where rows begin
    x_live,  # [BLOCK_M]
    w,
    gate_at,  # [BLOCK_N] where rows of gate begin
    up_at,  # [BLOCK_N] where those of up do
    w_live,  # [BLOCK_N]
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both products, [BLOCK_M, BLOCK_N] in float32, of plain weights: the same sums in the same order as one product
    after the other."""
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    EXACT: tl.constexpr = tl.float32 == DTYPE
    for start in range(0, columns, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < columns
        xs = tl.load(x + x_at[:, None] + column[None, :], mask=x_live[:, None] & inside[None, :], other=0.0)
        mask = w_live[None, :] & inside[:, None]
        gates = tl.load(w + gate_at[None, :] + column[:, None], mask=mask, other=0.0)
        ups = tl.load(w + up_at[None, :] + column[:, None], mask=mask, other=0.0)
        gate = dot(xs, gates, gate, EXACT)
        up = dot(xs, ups, up, EXACT)
    return gate, up
