"""Products of the rows that each expert was given, and the sum of what a token's experts say.

What changes from step to step is not specialized, as in matmul.py.
"""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier
from anychip_triton.kernels.matmul import features
from anychip_triton.kernels.routing import owner_of_tile


@triton.jit(do_not_specialize=["num_experts"])
def expert_matmul(
    out,  # [pairs, out_features]; a pair is a token and one of its choices
    x,  # [tokens, columns], or [pairs, columns] where TOP_K is 1
    x_scale,
    w,  # [experts, out_features or twice as many, columns]
    w_scale,
    w_zero,
    bias,  # [experts, the same]
    pair_experts,  # [pairs]: negative ones are not computed
    order,  # [pairs]: pairs by expert, where SORTED
    pair_ends,  # [experts]: where each expert's pairs end in `order`
    tile_ends,  # [experts]: how many tiles all experts up to each have
    num_experts,
    out_features,
    columns,
    x_stride,
    w_stride,
    x_groups,
    w_groups,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_KIND: tl.constexpr,
    X_SCALES: tl.constexpr,
    W_KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FP8: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """A tile of pairs of one expert; not SORTED: one pair a tile, for batches so small that few experts meet twice.
    ACTIVATION "": a product; otherwise of gate and up, which stand below one another in w, activated."""
    if CHAINED:
        after_earlier()
    tile = tl.program_id(1)
    DTYPE: tl.constexpr = out.dtype.element_ty
    lanes = tl.arange(0, BLOCK_M)
    if SORTED:
        expert = owner_of_tile(tile, tile_ends, num_experts)
        if expert == num_experts:
            return
        before = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
        begins = tl.load(pair_ends + expert - 1, mask=expert > 0, other=0)
        place = begins + (tile - before) * BLOCK_M + lanes
        live = place < tl.load(pair_ends + expert)
        pair = tl.load(order + place, mask=live, other=0).to(tl.int64)
    else:
        expert = tl.load(pair_experts + tile)
        if expert < 0:
            return
        live = lanes == 0
        pair = (tile + tl.zeros([BLOCK_M], tl.int32)).to(tl.int64)
    source = pair // TOP_K
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = feature < out_features
    HALVES: tl.constexpr = 1 if ACTIVATION == "" else 2
    row = expert.to(tl.int64) * out_features * HALVES + feature
    result = features(
        x, source * x_stride, live, x_scale, source * x_groups,
        w, row, inside, w_scale, w_zero, bias, w_stride, w_groups, out_features, columns,
        GROUP, BLOCK_M, BLOCK_N, BLOCK_K, X_KIND, X_SCALES, W_KIND, HAS_ZERO, HAS_BIAS, FP8, ACTIVATION, DTYPE,
    )  # fmt: skip
    at = pair[:, None] * out_features + feature[None, :]
    tl.store(out + at, result.to(DTYPE), mask=live[:, None] & inside[None, :])


@triton.jit
def combine_pairs(
    out,  # [tokens, width]
    parts,  # [tokens * TOP_K, width]
    weights,  # [tokens, TOP_K] float32
    pair_experts,
    width,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """The weighted sum of each token's pairs, always in the same order."""
    if CHAINED:
        after_earlier()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        held = tl.load(pair_experts + pair) >= 0
        part = tl.load(parts + pair * width + at, mask=inside & held, other=0.0).to(tl.float32)
        total += part * tl.load(weights + pair)
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), mask=inside)
