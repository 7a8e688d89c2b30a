"""RMS norm, with the residual's sum where there is one; activations of gated MLPs."""

import triton
import triton.language as tl

from anychip_triton.kernels.numbers import tanh


@triton.jit
def rms_norm(
    out,  # [rows, width], contiguous
    total,  # [rows, width]: x + residual, where HAS_RESIDUAL
    x,
    residual,
    weight,  # [width]
    eps,
    x_stride,
    residual_stride,
    width,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
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
    tl.store(out + row * width + at, (normed * gain).to(DTYPE), mask=inside)


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
def gated_activation(out, gate_up, stride, width, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """out [rows, width] of gate_up [rows, 2 * width]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, activated(gate, up, ACTIVATION).to(out.dtype.element_ty), mask=inside)
