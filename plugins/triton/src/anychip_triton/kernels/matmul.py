"""Matrix products x W^T, dense and quantized; rounding activations to 8 bits.

Weights stay as checkpoints have them, [out_features, in_features], two int4 to a byte. A scale is applied to the
partial sum of the columns that share it, so that only integers and 8-bit floats enter a product, all of them exact in
the activations' dtype.

Arguments that change from step to step are not specialized: a number that happens to be 1, or a multiple of 16, would
be another form of the kernel, compiled when it first comes.
"""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier
from anychip_triton.kernels.gated import accumulate_both
from anychip_triton.kernels.norm import activated
from anychip_triton.kernels.numbers import as_fp8, dot, fp8_to_float, in_8_bits, scale_of

NARROW_COLUMNS = tl.constexpr(32)
"""Columns that a product of two 8-bit tiles has at least, on NVIDIA's matrix units; of fewer, both are widened."""


@triton.jit
def _activations(x, offsets, mask, X_KIND: tl.constexpr, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """A tile as it enters the product. X_KIND: "plain", "fp8" or "int8"."""
    if X_KIND == "plain":
        return tl.load(x + offsets, mask=mask, other=0.0)
    elif X_KIND == "int8":
        return tl.load(x + offsets, mask=mask, other=0)
    elif FP8 != "":
        return as_fp8(tl.load(x + offsets, mask=mask, other=0), FP8)
    else:
        return fp8_to_float(tl.load(x + offsets, mask=mask, other=0)).to(DTYPE)


@triton.jit
def _zero(w_zero, at, live, W_KIND: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr):
    """What to take off the integers of each row, [1, BLOCK_N] float32."""
    if HAS_ZERO:
        return tl.load(w_zero + at, mask=live, other=0).to(tl.float32)[None, :]
    else:
        return tl.full([1, BLOCK_N], 8.0 if W_KIND == "int4" else 0.0, tl.float32)


@triton.jit
def _weights(byte, zero, W_KIND: tl.constexpr, X_KIND: tl.constexpr, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes of weights as they enter the product; `zero` is what to take off integers."""
    if W_KIND == "fp8" and FP8 != "" and X_KIND == "fp8":
        return as_fp8(byte, FP8)
    elif W_KIND == "fp8":
        return fp8_to_float(byte).to(DTYPE)
    elif X_KIND == "int8":
        return byte.to(tl.int8)
    else:
        return (byte.to(tl.float32) - zero).to(DTYPE)


@triton.jit
def accumulate(
    x,
    x_at,  # [BLOCK_M] where rows begin
    x_live,  # [BLOCK_M]
    x_scale,
    x_scale_at,  # [BLOCK_M] where rows' scales begin
    w,
    w_at,  # [BLOCK_N] where rows begin
    w_live,  # [BLOCK_N]
    w_scale,
    w_zero,
    w_scale_at,  # [BLOCK_N] where rows' scales begin
    columns,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_KIND: tl.constexpr,
    X_SCALES: tl.constexpr,
    W_KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    FP8: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The tile's product [BLOCK_M, BLOCK_N] in float32, scales applied. GROUP: columns that share a scale, a multiple
    of BLOCK_K; 0 where a row has one. FP8: how the matrix units take 8-bit floats, "fn" or "fnuz"; "" where they are
    widened."""
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    EXACT: tl.constexpr = tl.float32 == DTYPE
    # Sums of so few integers are exact in float32 too.
    WIDE: tl.constexpr = BLOCK_K < NARROW_COLUMNS
    for start in range(0, columns, BLOCK_K):
        group = 0 if GROUP == 0 else start // GROUP
        zero = _zero(w_zero, w_scale_at + group, w_live, W_KIND, HAS_ZERO, BLOCK_N)
        if W_KIND == "int4":
            pairs = start // 2 + tl.arange(0, BLOCK_K // 2)
            even, odd = 2 * pairs, 2 * pairs + 1
            both = tl.load(
                w + w_at[None, :] + pairs[:, None], mask=w_live[None, :] & (even < columns)[:, None], other=0
            )
            xs_even = _activations(
                x, x_at[:, None] + even[None, :], x_live[:, None] & (even < columns)[None, :], X_KIND, FP8, DTYPE
            )
            xs_odd = _activations(
                x, x_at[:, None] + odd[None, :], x_live[:, None] & (odd < columns)[None, :], X_KIND, FP8, DTYPE
            )
            low = _weights(both & 15, zero, W_KIND, X_KIND, FP8, DTYPE)
            high = _weights(both >> 4, zero, W_KIND, X_KIND, FP8, DTYPE)
            part = dot(xs_even, low, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), EXACT)
            part = dot(xs_odd, high, part, EXACT)
        else:
            column = start + tl.arange(0, BLOCK_K)
            inside = column < columns
            xs = _activations(x, x_at[:, None] + column[None, :], x_live[:, None] & inside[None, :], X_KIND, FP8, DTYPE)
            at = w_at[None, :] + column[:, None]
            mask = w_live[None, :] & inside[:, None]
            if W_KIND == "plain":
                ws = tl.load(w + at, mask=mask, other=0.0)
            else:
                ws = _weights(tl.load(w + at, mask=mask, other=0), zero, W_KIND, X_KIND, FP8, DTYPE)
            if X_KIND == "int8" and WIDE:
                part = dot(xs.to(DTYPE), ws.to(DTYPE), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), EXACT)
            elif X_KIND == "int8":
                part = tl.dot(xs, ws, out_dtype=tl.int32).to(tl.float32)
            elif GROUP == 0:
                part = dot(xs, ws, result, EXACT)
            else:
                part = dot(xs, ws, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), EXACT)
        if GROUP > 0:
            by = tl.load(w_scale + w_scale_at + group, mask=w_live, other=0.0)
            part *= by[None, :]
            if X_SCALES == "group":
                part *= tl.load(x_scale + x_scale_at + group, mask=x_live, other=0.0)[:, None]
            result += part
        elif W_KIND == "int4" or X_KIND == "int8":
            result += part
        else:
            result = part
    if GROUP == 0 and W_KIND != "plain":
        result *= tl.load(w_scale + w_scale_at, mask=w_live, other=0.0)[None, :]
    if X_SCALES == "token":
        result *= tl.load(x_scale + x_scale_at, mask=x_live, other=0.0)[:, None]
    elif X_SCALES == "one":
        result *= tl.load(x_scale)
    if FP8 == "fnuz" and X_KIND == "fp8":
        result *= 4.0  # as_fp8 halves both sides
    return result


@triton.jit
def features(
    x,
    x_at,
    x_live,
    x_scale,
    x_scale_at,
    w,
    row,  # [BLOCK_N] rows of w
    w_live,
    w_scale,
    w_zero,
    bias,
    w_stride,
    w_groups,
    up,  # how far below a row of gate that of up stands, where ACTIVATION
    columns,
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
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile of results in float32, bias and activation applied. ACTIVATION "": the product; else of gate and up."""
    below = row + up
    if ACTIVATION != "" and W_KIND == "plain":
        result, other = accumulate_both(
            x, x_at, x_live, w, row * w_stride, below * w_stride, w_live, columns, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE
        )
    else:
        result = accumulate(
            x, x_at, x_live, x_scale, x_scale_at, w, row * w_stride, w_live, w_scale, w_zero, row * w_groups, columns,
            GROUP, BLOCK_M, BLOCK_N, BLOCK_K, X_KIND, X_SCALES, W_KIND, HAS_ZERO, FP8, DTYPE,
        )  # fmt: skip
        if ACTIVATION != "":
            other = accumulate(
                x, x_at, x_live, x_scale, x_scale_at, w, below * w_stride, w_live, w_scale, w_zero, below * w_groups,
                columns, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, X_KIND, X_SCALES, W_KIND, HAS_ZERO, FP8, DTYPE,
            )  # fmt: skip
    if HAS_BIAS:
        result += tl.load(bias + row, mask=w_live, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        if HAS_BIAS:
            other += tl.load(bias + below, mask=w_live, other=0.0).to(tl.float32)[None, :]
        # As if gate and up had been stored: the reference rounds them there.
        result = activated(result.to(DTYPE).to(tl.float32), other.to(DTYPE).to(tl.float32), ACTIVATION)
    return result


@triton.jit(do_not_specialize=["rows"])
def matmul(
    out,  # [rows, out_features]
    x,  # [rows, columns]
    x_scale,
    w,  # [out_features, columns], or half as many bytes of int4; twice as many rows where ACTIVATION
    w_scale,  # [out_features, groups] float32
    w_zero,  # [out_features, groups] uint8
    bias,  # [out_features]
    rows,
    out_features,
    columns,
    out_stride,
    x_stride,
    w_stride,
    x_groups,
    w_groups,
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
    ACTIVATION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One tile. Programs next to each other share rows of weights, which are the larger side to read again."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_live, feature_live = row < rows, feature < out_features
    DTYPE: tl.constexpr = out.dtype.element_ty
    if CHAINED:
        after_earlier()
    result = features(
        x, row.to(tl.int64) * x_stride, row_live, x_scale, row * x_groups,
        w, feature.to(tl.int64), feature_live, w_scale, w_zero, bias, w_stride, w_groups, out_features, columns,
        GROUP, BLOCK_M, BLOCK_N, BLOCK_K, X_KIND, X_SCALES, W_KIND, HAS_ZERO, HAS_BIAS, FP8, ACTIVATION, DTYPE,
    )  # fmt: skip
    at = row.to(tl.int64)[:, None] * out_stride + feature[None, :]
    tl.store(out + at, result.to(DTYPE), mask=row_live[:, None] & feature_live[None, :])


@triton.jit
def quantize_rows(
    out,  # [rows, columns] uint8 or int8
    scales,  # [rows, groups] float32; read where STATIC, and then [1]
    x,  # [rows, columns]
    columns,
    groups,
    x_stride,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    STATIC: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Activations in 8 bits, symmetrically: with a scale for each GROUP columns of a row, or with one that is given."""
    if CHAINED:
        after_earlier()
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = group * GROUP + tl.arange(0, BLOCK)
    inside = (tl.arange(0, BLOCK) < GROUP) & (column < columns)
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if STATIC:
        scale = tl.load(scales)
    else:
        scale = scale_of(tl.max(tl.abs(values), 0), KIND)
        tl.store(scales + row * groups + group, scale)
    tl.store(out + row * columns + column, in_8_bits(values / scale, KIND), mask=inside)
