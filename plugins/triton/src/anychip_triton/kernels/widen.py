"""Quantized weights as plain numbers, for products of so many rows that the vendor's library is ahead."""

import triton
import triton.language as tl

from anychip_triton.kernels.numbers import fp8_to_float


@triton.jit
def widen(
    out,  # [features, columns]
    w,  # [features, columns], or half as many bytes of int4
    w_scale,  # [features, groups] float32
    w_zero,  # [features, groups] uint8
    columns,
    w_stride,
    w_groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    W_KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Program (feature, block of columns). GROUP: columns that share a scale; 0 where a row has one."""
    feature = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < columns
    if W_KIND == "int4":
        pair = first // 2 + tl.arange(0, BLOCK // 2)
        both = tl.load(w + feature * w_stride + pair, mask=2 * pair < columns, other=0)
        value = tl.interleave(both & 15, both >> 4).to(tl.float32)
    elif W_KIND == "fp8":
        value = fp8_to_float(tl.load(w + feature * w_stride + column, mask=inside, other=0))
    else:
        value = tl.load(w + feature * w_stride + column, mask=inside, other=0).to(tl.float32)
    group = column * 0 if GROUP == 0 else column // GROUP
    if HAS_ZERO:
        value -= tl.load(w_zero + feature * w_groups + group, mask=inside, other=0).to(tl.float32)
    elif W_KIND == "int4":
        value -= 8.0
    value *= tl.load(w_scale + feature * w_groups + group, mask=inside, other=0.0)
    tl.store(out + feature * columns + column, value.to(out.dtype.element_ty), mask=inside)
