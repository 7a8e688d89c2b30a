"""Queries and keys normed and rotated, keys and values written to their slots: one launch for a layer."""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier
from anychip_triton.kernels.numbers import float_to_fp8, round_to_even


@triton.jit
def _encoded(x, scale, BYTES: tl.constexpr, DTYPE: tl.constexpr):
    """Keys or values as the cache holds them."""
    if BYTES == "fp8":
        return float_to_fp8(x / scale)
    elif BYTES == "int8":
        return round_to_even(tl.clamp(x / scale, -127.0, 127.0)).to(tl.int8).to(tl.uint8, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def _normed(x, square_mean, weight, dims, in_dim, eps, UNIT_OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    gain = tl.load(weight + dims, mask=in_dim, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        gain += 1.0
    return (x * tl.rsqrt(square_mean + eps) * gain).to(DTYPE).to(tl.float32)


@triton.jit
def rotate_and_write(
    q_out,  # [num_tokens, num_heads, head_dim], contiguous
    cache,  # [num_blocks, 2, block_size, num_kv_heads, head_dim]
    q,
    k,  # [num_tokens, num_kv_heads, head_dim]
    v,
    q_weight,  # [head_dim]
    k_weight,
    cos,  # [max_positions, rotary_dim / 2] float32
    sin,
    positions,  # [num_tokens]
    slots,  # [num_tokens]; negative ones are not written
    k_scale,
    v_scale,
    eps,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    block_stride,
    value_offset,
    slot_stride,
    k_scale_stride,
    v_scale_stride,
    FIRST_HEAD: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    PAGE: tl.constexpr,
    BYTES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (token, block of heads): blocks of query heads from FIRST_HEAD on, then of key heads with their values.
    The heads of a block share their angles."""
    if CHAINED:
        after_earlier()
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    DTYPE: tl.constexpr = q.dtype.element_ty
    QUERY_BLOCKS: tl.constexpr = (NUM_HEADS - FIRST_HEAD + BLOCK_H - 1) // BLOCK_H
    is_query = block < QUERY_BLOCKS
    slot = tl.load(slots + token).to(tl.int64)
    if (not is_query) & (slot < 0):
        return
    if is_query:
        head = FIRST_HEAD + block * BLOCK_H + tl.arange(0, BLOCK_H)
        count = NUM_HEADS
        source = q + token * q_token_stride + head * q_head_stride
        weight = q_weight
    else:
        head = (block - QUERY_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        count = NUM_KV_HEADS
        source = k + token * k_token_stride + head * k_head_stride
        weight = k_weight
    dims = tl.arange(0, PADDED_DIM)[None, :]
    in_dim = dims < HEAD_DIM
    there = (head < count)[:, None]
    x = tl.load(source[:, None] + dims, mask=there & in_dim, other=0.0).to(tl.float32)
    if HAS_NORM:
        square_mean = (tl.sum(x * x, 1) / HEAD_DIM)[:, None]
        x = _normed(x, square_mean, weight, dims, in_dim, eps, UNIT_OFFSET, DTYPE)
    if ROTARY_DIM > 0:
        turned = dims < ROTARY_DIM
        if INTERLEAVED:
            partner = dims ^ 1
            angle = dims // 2
            sign = tl.where(dims % 2 == 0, -1.0, 1.0)
        else:
            HALF: tl.constexpr = ROTARY_DIM // 2
            partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
            angle = tl.where(dims < HALF, dims, dims - HALF)
            sign = tl.where(dims < HALF, -1.0, 1.0)
        other = tl.load(source[:, None] + partner, mask=there & turned, other=0.0).to(tl.float32)
        if HAS_NORM:
            other = _normed(other, square_mean, weight, partner, turned, eps, UNIT_OFFSET, DTYPE)
        at = tl.load(positions + token).to(tl.int64) * (ROTARY_DIM // 2) + angle
        c = tl.load(cos + at, mask=turned, other=1.0)
        s = tl.load(sin + at, mask=turned, other=0.0)
        x = (x * c + sign * other * s).to(DTYPE).to(tl.float32)
    inside = there & in_dim
    if is_query:
        tl.store(q_out + (token * NUM_HEADS + head[:, None]) * HEAD_DIM + dims, x.to(DTYPE), mask=inside)
    else:
        place = slot // PAGE * block_stride + slot % PAGE * slot_stride + head[:, None] * HEAD_DIM + dims
        value = tl.load(v + token * v_token_stride + head[:, None] * v_head_stride + dims, mask=inside, other=0.0)
        k_by, v_by = 1.0, 1.0
        if BYTES != "":
            k_by = tl.load(k_scale + head * k_scale_stride, mask=head < count, other=1.0)[:, None]
            v_by = tl.load(v_scale + head * v_scale_stride, mask=head < count, other=1.0)[:, None]
        tl.store(cache + place, _encoded(x, k_by, BYTES, DTYPE), mask=inside)
        tl.store(cache + value_offset + place, _encoded(value.to(tl.float32), v_by, BYTES, DTYPE), mask=inside)
