"""Conversions that every target and the interpreter do alike, bit by bit.

float8_e4m3fn goes through integers: sm_80 and gfx90a have no such type, and gfx942's has another bias. Only what enters
a product of matrix units that have it does not.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
"""By which a natural logarithm becomes one to the base of 2."""


@triton.jit
def fp8_to_float(byte):
    """float8_e4m3fn, as uint8, to float32. NaN is not among the values that anychip stores."""
    wide = byte.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    # A float16 of the same fields has an exponent bias of 15 instead of 7.
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def float_to_fp8(x):
    """float32 to the nearest float8_e4m3fn, ties to even, as uint8; beyond the range its largest value. Zero has no
    sign."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    ordinary = size.to(tl.int32, bitcast=True)
    rounded = (ordinary + 0x7FFFF + ((ordinary >> 20) & 1)) >> 20
    # 2^14 has an ulp of 2^-9, the step below the least ordinary value: the sum rounds to it.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, rounded - ((127 - 7) << 3))
    return tl.where(code == 0, 0, code | sign).to(tl.uint8)


@triton.jit
def as_fp8(byte, FP8: tl.constexpr):
    """float8_e4m3fn, as uint8, for matrix units that take it, "fn", or "fnuz": there the same bits are half as much,
    and those of a negative zero no number."""
    if FP8 == "fnuz":
        return byte.to(tl.float8e4b8, bitcast=True)
    else:
        return byte.to(tl.float8e4nv, bitcast=True)


@triton.jit
def round_to_even(x):
    """The nearest integer, for values below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def scale_of(largest, KIND: tl.constexpr):
    """The scale with which values up to `largest` fill 8 bits. KIND: "fp8" or "int8"."""
    MOST: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
    return tl.maximum(largest, 1e-12) / MOST


@triton.jit
def in_8_bits(scaled, KIND: tl.constexpr):
    """The nearest values of 8 bits."""
    if KIND == "fp8":
        return float_to_fp8(scaled)
    else:
        return round_to_even(scaled).to(tl.int8)


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def dot(a, b, accumulator, EXACT: tl.constexpr):
    """accumulator + a b; EXACT: float32 products as float32, not in fewer bits."""
    if EXACT:
        return tl.dot(a, b, acc=accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, acc=accumulator)
