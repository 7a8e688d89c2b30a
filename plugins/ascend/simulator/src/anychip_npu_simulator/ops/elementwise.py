"""Norms, rotary embedding and activations. Source: _op_plugin_docs.py under each name.

Sums are taken in float32, as the vector unit does, and the result is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip_npu_simulator.calls import EVERYWHERE, Arguments, simulates

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MAX_ROTARY_DIM, _MAX_ROTARY_ROWS = 896, 1000
_MAX_GELU_MUL_DIM, _MAX_GELU_MUL_ROWS = 1024, 200_000


def floats(a: Arguments, *arguments: str) -> None:
    """float32, float16 or bfloat16, bfloat16 not on a 310P, and all alike."""
    first = getattr(a, arguments[0]).dtype
    for argument in arguments:
        a.dtype(argument, *FLOATS)
        tensor = getattr(a, argument)
        a.check(
            tensor is None or tensor.dtype == first,
            argument,
            tensor is None or tensor.dtype,
            f"{first}, as {arguments[0]}",
        )


# -- norms -------------------------------------------------------------------------------------------------


def _normalised(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    wide = x.float()
    reverse = torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + epsilon)
    return (wide * reverse * gamma.float()).to(x.dtype), reverse


def _check_norm(a: Arguments, x: str, *others: str) -> None:
    floats(a, x, *others)
    a.dims(x, 1, 2, 3, 4, 5, 6, 7, 8)
    gamma, values = a.gamma, getattr(a, x)
    trailing = tuple(values.shape[values.dim() - gamma.dim() :])
    a.check(gamma.dim() and tuple(gamma.shape) == trailing, "gamma", f"of shape {tuple(gamma.shape)}", f"{trailing}")


@simulates("npu_rms_norm", lambda a: _check_norm(a, "input", "gamma"), "npu_rms_norm", products=EVERYWHERE)
def rms_norm(a: Arguments) -> tuple[Tensor, Tensor]:
    return _normalised(a.input, a.gamma, a.epsilon)


def _check_add_norm(a: Arguments) -> None:
    _check_norm(a, "x1", "x2", "gamma")
    a.shape("x2", tuple(a.x1.shape))


@simulates(
    "npu_add_rms_norm", _check_add_norm, "npu_add_rms_norm (op_plugin meta and aclnnAddRmsNorm)", products=EVERYWHERE
)
def add_rms_norm(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    total = (a.x1.float() + a.x2.float()).to(a.x1.dtype)
    y, reverse = _normalised(total, a.gamma, a.epsilon)
    return y, reverse, total


# -- rotary embedding --------------------------------------------------------------------------------------


def _check_rotary(a: Arguments) -> None:
    for name in ("input", "r1", "r2"):
        a.dtype(name, *FLOATS)
        a.dims(name, 4)
    a.absent("rotate")
    a.only("rotary_mode", "half", "interleave")
    shape, dim = tuple(a.input.shape), a.input.shape[-1]
    a.check(
        dim < _MAX_ROTARY_DIM and dim % 2 == 0,
        "input",
        f"of shape {shape}",
        f"an even last dimension below {_MAX_ROTARY_DIM}",
    )
    for name in ("r1", "r2"):
        given = tuple(getattr(a, name).shape)
        fits = given[3] == dim and all(mine in (1, theirs) for mine, theirs in zip(given, shape, strict=True))
        a.check(fits, name, f"of shape {given}", f"{shape}, or 1 in its leading dimensions")
    a.shape("r2", tuple(a.r1.shape))
    # Which layout it is shows in where r1 varies; batch and heads must be small in one that fits.
    layouts = {"BSND": (0, 2), "BNSD": (0, 1), "SBND": (1, 2)}
    possible = [
        name
        for name, (batch, heads) in layouts.items()
        if max(shape[batch], shape[heads]) < _MAX_ROTARY_ROWS
        and (a.r1.shape[heads] == 1 or a.r1.shape == a.input.shape)
    ]
    a.check(
        possible,
        "input",
        f"of shape {shape} with r1 {tuple(a.r1.shape)}",
        f"BNSD, BSND or SBND with B and N below {_MAX_ROTARY_ROWS}",
    )
    if a.rotary_mode == "interleave":
        a.check(a.r1.shape[0] == 1 or a.r1.shape[1] == 1, "r1", f"of shape {tuple(a.r1.shape)}", "11SD, 1S1D or S11D")


@simulates("npu_rotary_mul", _check_rotary, "npu_rotary_mul")
def rotary_mul(a: Arguments) -> Tensor:
    wide = a.input.float()
    if a.rotary_mode == "half":
        first, second = wide.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
    return (wide * a.r1.float() + turned * a.r2.float()).to(a.input.dtype)


# -- activations -------------------------------------------------------------------------------------------


def _check_swiglu(a: Arguments) -> None:
    floats(a, "input")
    a.dims("input", 1, 2, 3, 4, 5, 6, 7, 8)
    size = a.input.shape[a.dim]
    a.check(size % 2 == 0, "input", f"of shape {tuple(a.input.shape)}", f"an even dimension {a.dim}")


@simulates("npu_swiglu", _check_swiglu, "npu_swiglu")
def swiglu(a: Arguments) -> Tensor:
    gate, up = a.input.float().chunk(2, a.dim)
    return (F.silu(gate) * up).to(a.input.dtype)


def _check_gelu(a: Arguments) -> None:
    floats(a, "input")
    a.only("approximate", "none", "tanh")


@simulates("npu_gelu", _check_gelu, "npu_gelu (op_plugin meta and aclnnGeluV2)")
def gelu(a: Arguments) -> Tensor:
    return F.gelu(a.input.float(), approximate=a.approximate).to(a.input.dtype)


def _check_gelu_mul(a: Arguments) -> None:
    _check_gelu(a)
    a.dims("input", 2, 3, 4, 5, 6, 7, 8)
    shape, size = tuple(a.input.shape), a.input.shape[-1]
    a.check(
        size % 2 == 0 and size <= _MAX_GELU_MUL_DIM,
        "input",
        f"of shape {shape}",
        f"an even last dimension up to {_MAX_GELU_MUL_DIM}",
    )
    rows = a.input.numel() // max(size, 1)
    a.check(rows <= _MAX_GELU_MUL_ROWS, "input", f"of {rows} rows", f"up to {_MAX_GELU_MUL_ROWS}")


@simulates("npu_gelu_mul", _check_gelu_mul, "npu_gelu_mul")
def gelu_mul(a: Arguments) -> Tensor:
    gate, up = a.input.float().chunk(2, -1)
    return (F.gelu(gate, approximate=a.approximate) * up).to(a.input.dtype)
