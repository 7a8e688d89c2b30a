"""RMS norm, with the residual's sum where there is one; activations of gated MLPs. Either writes plain values or, with
a KIND, those of 8 bits with their scales, as formats.py has them."""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier
from anychip_triton.kernels.numbers import in_8_bits, scale_of, tanh


@triton.jit
def _store(
    out, scales, values, row, at, inside, out_stride, scale_stride,
    DTYPE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values [BLOCK] of a row, rounded to DTYPE first. GROUP 0: one scale for all of them."""
    plain = values.to(DTYPE)
    place = out + row * out_stride + at
    if KIND == "":
        tl.store(place, plain, mask=inside)
    elif GROUP == 0:
        rounded = tl.where(inside, plain.to(tl.float32), 0.0)
        scale = scale_of(tl.max(tl.abs(rounded), 0), KIND)
        tl.store(scales + row * scale_stride, scale)
        tl.store(place, in_8_bits(rounded / scale, KIND), mask=inside)
    else:
        GROUPS: tl.constexpr = BLOCK // GROUP
        rounded = tl.reshape(tl.where(inside, plain.to(tl.float32), 0.0), [GROUPS, GROUP])
        scale = scale_of(tl.max(tl.abs(rounded), 1), KIND)
        begins = tl.min(tl.reshape(at, [GROUPS, GROUP]), 1)
        whole = tl.max(tl.reshape(inside.to(tl.int32), [GROUPS, GROUP]), 1) == 1
        tl.store(scales + row * scale_stride + begins // GROUP, scale, mask=whole)
        tl.store(place, tl.reshape(in_8_bits(rounded / scale[:, None], KIND), [BLOCK]), mask=inside)


@triton.jit
def rms_norm(
    out,  # [rows, width]
    scales,
    total,  # [rows, width]: x + residual, where HAS_RESIDUAL
    x,
    residual,
    weight,  # [width]
    eps,
    x_stride,
    residual_stride,
    out_stride,
    scale_stride,
    width,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    CHAINED: tl.constexpr,
):
    if CHAINED:
        after_earlier()
    row = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = x.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        carried = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
        summed = (values + carried).to(DTYPE)
        tl.store(total + row * width + at, summed, mask=inside)
        values = summed.to(tl.float32)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        gain += 1.0
    normed = values * tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    _store(out, scales, normed * gain, row, at, inside, out_stride, scale_stride, DTYPE, KIND, GROUP, BLOCK)


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    """act(gate) * up in float32; the names are MoESpec's."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return 0.5 * gate * (1.0 + tanh(inner)) * up
    else:
        tl.static_assert(ACTIVATION == "swiglu_clamped", "an unknown activation")
        gate = tl.minimum(gate, 7.0)
        up = tl.clamp(up, -7.0, 7.0)
        return (up + 1.0) * gate * tl.sigmoid(1.702 * gate)


@triton.jit
def gated_activation(
    out, scales, gate_up, stride, out_stride, scale_stride, width,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """out [rows, width] of gate_up [rows, 2 * width]."""
    if CHAINED:
        after_earlier()
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + at, mask=inside, other=0.0).to(tl.float32)
    result = activated(gate, up, ACTIVATION)
    _store(out, scales, result, row, at, inside, out_stride, scale_stride, DTYPE, KIND, GROUP, BLOCK)
