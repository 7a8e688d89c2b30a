"""Which experts a token goes to, and which tokens an expert gets."""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier


@triton.jit
def route(
    weights,  # [tokens, TOP_K] float32
    expert_ids,  # [tokens, TOP_K] int32
    logits,  # [tokens, experts]
    bias,  # [experts], for picking only
    router_scale,
    stride,
    experts,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """The best TOP_K by score, the lower id first among equals."""
    if CHAINED:
        after_earlier()
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < experts
    row = tl.load(logits + token * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        scores = tl.exp(row - tl.max(row, 0))
        scores = scores / tl.sum(scores, 0)
    else:
        scores = tl.sigmoid(row)
    picking = scores
    if HAS_BIAS:
        picking += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    # Above what is no expert or was picked, also where it is NaN, which argmax never picks: ids stay in range.
    picking = tl.where(inside, tl.where(picking > -3.0e38, picking, -3.0e38), float("-inf"))
    slot = tl.arange(0, PADDED_K)
    picked_ids = tl.zeros([PADDED_K], tl.int32)
    picked = tl.zeros([PADDED_K], tl.float32)
    for choice in tl.static_range(TOP_K):
        best = tl.argmax(picking, 0, tie_break_left=True)
        chosen = at == best
        picked_ids = tl.where(slot == choice, best.to(tl.int32), picked_ids)
        picked = tl.where(slot == choice, tl.sum(tl.where(chosen, scores, 0.0), 0), picked)
        picking = tl.where(chosen, float("-inf"), picking)
    if RENORMALIZE:
        picked = picked / tl.sum(picked, 0)
    place = token * TOP_K + slot
    tl.store(weights + place, picked * router_scale, mask=slot < TOP_K)
    tl.store(expert_ids + place, picked_ids, mask=slot < TOP_K)


@triton.jit(do_not_specialize=["pairs"])
def sort_pairs(
    order,  # [pairs]: pairs by expert, in the order of pairs
    pair_ends,  # [experts]: where each expert's pairs end in `order`
    tile_ends,  # [experts]: how many tiles of TILE pairs all experts up to each have
    pair_experts,  # [pairs]: negative ones go to no expert
    pairs,
    experts,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """A counting sort in one launch: the program of each expert counts all pairs, then writes its own."""
    if CHAINED:
        after_earlier()
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(pair_experts + at, mask=at < pairs, other=-1)
        counts += tl.histogram(tl.where(ids < 0, BINS - 1, ids), BINS)
    counts = tl.where(bins < experts, counts, 0)
    tl.store(tile_ends + expert, tl.sum(tl.where(bins <= expert, tl.cdiv(counts, TILE), 0), 0))
    tl.store(pair_ends + expert, tl.sum(tl.where(bins <= expert, counts, 0), 0))
    place = tl.sum(tl.where(bins < expert, counts, 0), 0)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = (tl.load(pair_experts + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, 0) - 1, at, mask=mine == 1)
        place += tl.sum(mine, 0)


@triton.jit
def owner_of_tile(tile, tile_ends, count):
    """Which of `count` a tile belongs to, by how many tiles all up to each have; `count` where it is none's."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if tl.load(tile_ends + middle) <= tile:
            low = middle + 1
        else:
            high = middle
    return low
