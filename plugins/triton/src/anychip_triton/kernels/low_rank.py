"""What adapters add behind a product: two thin products for each tile of tokens that have one adapter.

Sums between the two are float32: rounded, they would lose more than the adapter's own rounding. What changes from step
to step is not specialized, as in matmul.py.
"""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier
from anychip_triton.kernels.numbers import dot
from anychip_triton.kernels.routing import owner_of_tile


@triton.jit
def _tokens(tile, place_of, order, ends, tile_ends, places, SORTED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The place of a tile's adapter, its tokens, and which of them there are. Of a tile without any, the place is
    negative. Not SORTED: a tile has one token."""
    lanes = tl.arange(0, BLOCK_M)
    if SORTED:
        owner = owner_of_tile(tile, tile_ends, places)
        exists = owner < places
        before = tl.load(tile_ends + owner - 1, mask=exists & (owner > 0), other=0)
        begins = tl.load(ends + owner - 1, mask=exists & (owner > 0), other=0)
        at = begins + (tile - before) * BLOCK_M + lanes
        live = exists & (at < tl.load(ends + owner, mask=exists, other=0))
        token = tl.load(order + at, mask=live, other=0).to(tl.int64)
        place = tl.where(exists, owner, -1)
    else:
        place = tl.load(place_of + tile)
        live = lanes == 0
        token = (tile + tl.zeros([BLOCK_M], tl.int32)).to(tl.int64)
    return place, token, live


@triton.jit(do_not_specialize=["places"])
def low_rank_down(
    inner,  # [tokens, parts, max_rank] float32
    x,  # [tokens, columns]
    down,  # [places, parts, max_rank, columns]
    scales,  # [places, parts]
    ranks,  # [places, parts]
    place_of,  # [tokens]: negative ones have no adapter
    order,  # [tokens]: tokens by place, where SORTED
    ends,  # [places]: where each place's tokens end in `order`
    tile_ends,  # [places]: how many tiles all places up to each have
    places,
    parts,
    max_rank,
    columns,
    x_stride,
    SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """scale * x A^T for a tile of tokens, a part and a block of its ranks."""
    if CHAINED:
        after_earlier()
    DTYPE: tl.constexpr = x.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    place, token, live = _tokens(tl.program_id(1), place_of, order, ends, tile_ends, places, SORTED, BLOCK_M)
    if place < 0:
        return
    blocks = tl.cdiv(max_rank, BLOCK_R)
    part = tl.program_id(0) // blocks
    at = place.to(tl.int64) * parts + part
    rank = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    own = rank < tl.load(ranks + at)
    row = (at * max_rank + rank) * columns
    result = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, columns, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < columns
        xs = tl.load(x + token[:, None] * x_stride + column[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        held = tl.load(down + row[None, :] + column[:, None], mask=own[None, :] & inside[:, None], other=0.0)
        result = dot(xs, held, result, EXACT)
    result *= tl.load(scales + at)
    goal = (token[:, None] * parts + part) * max_rank + rank[None, :]
    tl.store(inner + goal, result, mask=live[:, None] & own[None, :])


@triton.jit(do_not_specialize=["places", "part", "begin", "end"])
def low_rank_up(
    y,  # [tokens, out_features]
    inner,  # [tokens, parts, max_rank] float32
    up,  # [places, max_rank, out_features]
    ranks,  # [places, parts]
    place_of,
    order,
    ends,
    tile_ends,
    places,
    parts,
    part,
    begin,  # the part's columns
    end,
    max_rank,
    out_features,
    y_stride,
    SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Adds inner B^T to a tile of a part's columns, for as many ranks as the adapter has. A token without an adapter
    keeps its bits."""
    if CHAINED:
        after_earlier()
    place, token, live = _tokens(tl.program_id(1), place_of, order, ends, tile_ends, places, SORTED, BLOCK_M)
    if place < 0:
        return
    count = tl.load(ranks + place.to(tl.int64) * parts + part)
    if count == 0:
        return
    column = begin + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < end
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        own = rank < count
        source = (token[:, None] * parts + part) * max_rank + rank[None, :]
        inners = tl.load(inner + source, mask=live[:, None] & own[None, :], other=0.0)
        row = (place.to(tl.int64) * max_rank + rank) * out_features
        held = tl.load(up + row[:, None] + column[None, :], mask=own[:, None] & inside[None, :], other=0.0)
        total = dot(inners, held.to(tl.float32), total, True)
    goal = token[:, None] * y_stride + column[None, :]
    mask = live[:, None] & inside[None, :]
    known = tl.load(y + goal, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + goal, (known + total).to(y.dtype.element_ty), mask=mask)
