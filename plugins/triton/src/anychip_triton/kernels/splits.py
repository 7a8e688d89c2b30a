"""The parts in which attention.py reads the keys of a long row, put together."""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier
from anychip_triton.kernels.numbers import LOG2E


@triton.jit(do_not_specialize=["num_reqs", "splits"])
def combine_splits(
    out,  # [num_tokens, num_heads, head_dim]
    partial,  # as paged_attention writes them
    statistics,
    query_start,
    sinks,
    out_token_stride,
    num_reqs,
    splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MOST: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    if CHAINED:
        after_earlier()
    token, head = tl.program_id(0), tl.program_id(1)
    if token >= tl.load(query_start + num_reqs):
        return  # paged_attention has written its zeros
    split, dims = tl.arange(0, MOST), tl.arange(0, PADDED_DIM)
    made = split < splits
    place = (token.to(tl.int64) * NUM_HEADS + head) * splits + split
    highest = tl.load(statistics + place * 2, mask=made, other=float("-inf"))
    total = tl.load(statistics + place * 2 + 1, mask=made, other=0.0)
    most = tl.max(highest, 0)
    share = tl.exp2(highest - most)
    in_dim = dims < HEAD_DIM
    inside = made[:, None] & in_dim[None, :]
    parts = tl.load(partial + place[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
    whole = tl.sum(total * share, 0)
    if HAS_SINKS:
        whole += tl.exp2(tl.load(sinks + head) * LOG2E - most)
    result = tl.sum(parts * share[:, None], 0) / whole
    at = token.to(tl.int64) * out_token_stride + head * HEAD_DIM + dims
    tl.store(out + at, result.to(out.dtype.element_ty), mask=in_dim)
