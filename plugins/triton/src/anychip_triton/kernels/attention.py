"""Paged attention over ragged batches: chunks of prompts and single tokens in one launch, long sequences in splits.

A program takes BLOCK_Q queries of one row and the query heads that share one key head: a tile of BLOCK_M rows, so that
grouped heads read keys once. Dao et al., "FlashAttention", 2022, has the running softmax; Dao et al., "Flash-Decoding",
2023, the splits.
"""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier
from anychip_triton.kernels.numbers import LOG2E, dot, fp8_to_float, tanh


@triton.jit
def _row_of(tile, query_start, num_reqs, BLOCK_Q: tl.constexpr):
    """The row whose tiles begin at or before `tile`; num_reqs for the padding after all rows. A row's first tile is
    query_start // BLOCK_Q + row, which leaves room for the part-filled tiles of those before it."""
    low, high = 0, num_reqs + 1
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(query_start + middle) // BLOCK_Q + middle
        if begins <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _held(
    pointer, offsets, readable, in_dim, MASKED: tl.constexpr, PADDED: tl.constexpr, BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys or values in the queries' dtype; BYTES: "" as they are, "fp8" or "int8". What is not `readable`, where that
    is MASKED, or not `in_dim`, where dimensions are PADDED, is 0."""
    if MASKED and PADDED:
        held = tl.load(pointer + offsets, mask=readable & in_dim, other=0)
    elif MASKED:
        held = tl.load(pointer + offsets, mask=readable, other=0)
    elif PADDED:
        held = tl.load(pointer + offsets, mask=in_dim, other=0)
    else:
        held = tl.load(pointer + offsets)
    if BYTES == "fp8":
        held = fp8_to_float(held).to(DTYPE)
    elif BYTES == "int8":
        held = held.to(tl.int8, bitcast=True).to(DTYPE)
    return held


@triton.jit
def _attended(
    highest,  # [BLOCK_M] float32: of the scores so far, in powers of 2
    total,  # [BLOCK_M] float32: of the weights
    values,  # [BLOCK_M, PADDED_DIM] float32: their sum by weight
    queries,
    position,
    slope,
    at,
    stop,
    oldest,
    cache,
    cache_rows,
    block_table,
    row,
    kv_head,
    score_scale,
    softcap,
    window,
    table_stride,
    block_stride,
    value_offset,
    slot_stride,
    dims,
    in_dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    FOLDED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The running softmax after the keys `at` to `at + BLOCK_N`. Not MASKED: every query sees all of them. FOLDED: the
    scale is positive, and multiplies scores in the exponent. DESCRIBED: tiles that are not MASKED are read by way of
    `cache_rows`."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    ONE_PAGE: tl.constexpr = PAGE % BLOCK_N == 0
    keys = at + tl.arange(0, BLOCK_N)
    # What lies outside is not read: a block that a window has left may hold anything.
    readable = (keys < stop) & (keys >= oldest) if MASKED else keys >= 0
    table = block_table + row.to(tl.int64) * table_stride
    if ONE_PAGE:
        block = tl.load(table + at // PAGE)
        # Places within a page are the same for every page: one number changes from tile to tile.
        begins = block.to(tl.int64) * block_stride + (at % PAGE) * slot_stride + kv_head * HEAD_DIM
        where = tl.arange(0, BLOCK_N) * slot_stride
        held = cache + begins
    else:
        if MASKED:
            block = tl.load(table + keys // PAGE, mask=readable, other=0)
        else:
            block = tl.load(table + keys // PAGE)
        where = block.to(tl.int64) * block_stride + (keys % PAGE) * slot_stride + kv_head * HEAD_DIM
        held = cache
    if DESCRIBED and not MASKED:
        cache_row = block * (2 * PAGE) + at % PAGE
        k = cache_rows.load([cache_row, kv_head * HEAD_DIM]).T
    else:
        k_at = where[None, :] + dims[:, None]
        k = _held(held, k_at, readable[None, :], in_dim[:, None], MASKED, PADDED, BYTES, DTYPE)
    scores = dot(queries, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.float32 == DTYPE)
    by = 1.0
    if FOLDED:
        by = score_scale * LOG2E
    elif HAS_SOFTCAP:
        scores = softcap * tanh(scores * score_scale / softcap) * LOG2E
    else:
        scores = scores * (score_scale * LOG2E)
    if HAS_ALIBI:
        scores += (slope * LOG2E)[:, None] * (keys[None, :] - position[:, None]).to(tl.float32)
    if MASKED:
        visible = readable[None, :] & (keys[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (keys[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * by)
    safe = new_highest
    if MASKED:
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores * by - safe[:, None])
    kept = tl.exp2(highest - safe)
    if DESCRIBED and not MASKED:
        v = cache_rows.load([cache_row + PAGE, kv_head * HEAD_DIM])
    else:
        v_at = where[:, None] + dims[None, :]
        v = _held(held + value_offset, v_at, readable[:, None], in_dim[None, :], MASKED, PADDED, BYTES, DTYPE)
    values = dot(weights.to(DTYPE), v, values * kept[:, None], tl.float32 == DTYPE)
    return new_highest, total * kept + tl.sum(weights, 1), values


@triton.jit(do_not_specialize=["num_tokens", "num_reqs", "table_stride", "splits"])
def paged_attention(
    out,  # [num_tokens, num_heads, head_dim]
    partial,  # [num_tokens, num_heads, splits, head_dim] float32, where SPLIT
    statistics,  # [num_tokens, num_heads, splits, 2] float32: running maximum and sum
    q,  # [num_tokens, num_heads, head_dim]
    cache,  # [num_blocks, 2, block_size, num_kv_heads, head_dim]
    cache_rows,  # a descriptor of it as [num_blocks * 2 * block_size, num_kv_heads * head_dim], where DESCRIBED
    query_start,  # [num_reqs + 1]
    seq_lens,  # [num_reqs]
    block_table,  # [num_reqs, num_pages]
    sinks,  # [num_heads] float32
    slopes,  # [num_heads] float32
    k_scale,  # [1] or [num_kv_heads] float32
    v_scale,
    scale,
    softcap,
    window,
    num_tokens,
    num_reqs,
    splits,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    table_stride,
    block_stride,
    value_offset,
    slot_stride,
    k_scale_stride,
    v_scale_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SPLIT: tl.constexpr,
    BYTES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    FOLDED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    if CHAINED:
        after_earlier()
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    DTYPE: tl.constexpr = out.dtype.element_ty
    if ONE_TOKEN:
        row, first = tile, 0
        begin = tl.load(query_start + row)
        length = tl.load(query_start + row + 1) - begin
        padding = length == 0
        # Rows without a token write the tokens behind all rows', in their order: as many are before this one.
        begin = tl.where(padding, tl.load(query_start + num_reqs) + row - begin, begin)
        length = 1
    else:
        tile = tl.num_programs(0) - 1 - tile  # a row's last queries have the most keys: they begin first
        row = _row_of(tile, query_start, num_reqs, BLOCK_Q)
        begin = tl.load(query_start + row)
        padding = row == num_reqs
        end = tl.load(query_start + tl.where(padding, row, row + 1))
        length = tl.where(padding, num_tokens, end) - begin
        first = (tile - (begin // BLOCK_Q + row)) * BLOCK_Q
    if first >= length:
        return

    lanes = tl.arange(0, BLOCK_M)
    query = first + lanes // GROUP
    head = kv_head * GROUP + lanes % GROUP
    live = (query < length) & (lanes < BLOCK_Q * GROUP)
    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < HEAD_DIM
    token = (begin + query).to(tl.int64)
    out_at = token[:, None] * out_token_stride + head[:, None] * HEAD_DIM + dims[None, :]
    if padding:
        if split == 0:
            nothing = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32).to(DTYPE)
            tl.store(out + out_at, nothing, mask=live[:, None] & in_dim[None, :])
        return

    context = tl.load(seq_lens + row) - length
    q_at = token[:, None] * q_token_stride + head[:, None] * q_head_stride + dims[None, :]
    queries = tl.load(q + q_at, mask=live[:, None] & in_dim[None, :], other=0.0)
    score_scale = scale
    value_scale = 1.0
    if BYTES != "":
        score_scale = scale * tl.load(k_scale + kv_head * k_scale_stride)
        value_scale = tl.load(v_scale + kv_head * v_scale_stride)
    slope = scale
    if HAS_ALIBI:
        slope = tl.load(slopes + head, mask=live, other=0.0)

    last = context + tl.minimum(first + BLOCK_Q, length)
    oldest = 0
    if HAS_WINDOW:
        oldest = tl.maximum(context + first - window + 1, 0)
    start = oldest // BLOCK_N * BLOCK_N
    stop = last
    if SPLIT:
        # Splits follow from the row alone, so that its result does not depend on the batch.
        per_split = tl.cdiv(tl.cdiv(last - start, BLOCK_N), splits) * BLOCK_N
        start = start + split * per_split
        stop = tl.minimum(start + per_split, last)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    position = context + query
    # Blocks of keys before this one are whole, and every query of the tile sees all of them. Keys of 8 bits are widened
    # in so many registers that a second loop has none.
    seen = start
    if not HAS_WINDOW and BYTES == "":
        seen = tl.maximum(start, tl.minimum(stop, context + first + 1) // BLOCK_N * BLOCK_N)
        for at in range(start, seen, BLOCK_N):
            highest, total, values = _attended(
                highest, total, values, queries, position, slope, at, stop, oldest, cache, cache_rows, block_table, row,
                kv_head, score_scale, softcap, window, table_stride, block_stride, value_offset, slot_stride, dims,
                in_dim, BLOCK_M, BLOCK_N, HEAD_DIM, PADDED_DIM, PAGE, BYTES, DTYPE, False, HAS_SOFTCAP, HAS_ALIBI,
                FOLDED, DESCRIBED, False,
            )  # fmt: skip
    for at in range(seen, stop, BLOCK_N):
        highest, total, values = _attended(
            highest, total, values, queries, position, slope, at, stop, oldest, cache, cache_rows, block_table, row,
            kv_head, score_scale, softcap, window, table_stride, block_stride, value_offset, slot_stride, dims, in_dim,
            BLOCK_M, BLOCK_N, HEAD_DIM, PADDED_DIM, PAGE, BYTES, DTYPE, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI, FOLDED,
            DESCRIBED, True,
        )  # fmt: skip

    if SPLIT:
        place = (token * NUM_HEADS + head) * splits + split
        tl.store(statistics + place * 2, highest, mask=live)
        tl.store(statistics + place * 2 + 1, total, mask=live)
        part = partial + place[:, None] * HEAD_DIM + dims[None, :]
        tl.store(part, values * value_scale, mask=live[:, None] & in_dim[None, :])
    else:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=live, other=0.0) * LOG2E
            total += tl.exp2(sink - tl.where(live, highest, 0.0))
        result = values * (value_scale / tl.where(live, total, 1.0))[:, None]
        tl.store(out + out_at, result.to(DTYPE), mask=live[:, None] & in_dim[None, :])
