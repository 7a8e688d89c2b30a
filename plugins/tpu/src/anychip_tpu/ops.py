"""Ops whose lowering by torch_xla is not as exact as their contract asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference import functional
from anychip.plugin_api import op_override
from anychip_tpu.sampling import sample

_TANH_SERIES = (
    1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075, -929569 / 638512875,
    6404582 / 10854718875, -443861162 / 1856156927625,
)  # fmt: skip
"""Taylor's of tanh(x) / x, by powers of x squared. What follows is below half a unit in the last place up to here:"""
_SERIES_BELOW = 0.55


@op_override("gated_activation", version=1)
def gated_activation(*, gate_up: Tensor, activation: str) -> Tensor:
    if activation != "gelu_tanh":
        return functional.gated_activation(gate_up=gate_up, activation=activation)
    gate, up = gate_up.chunk(2, dim=-1)
    # XLA would round each of the polynomial's steps to the activations' dtype.
    return F.gelu(gate.float(), approximate="tanh").to(gate.dtype) * up


@op_override("softcap", version=1)
def softcap(*, x: Tensor, cap: float) -> Tensor:
    return cap * tanh(x / cap)


def tanh(x: Tensor) -> Tensor:
    """Within 3 units in the last place of float32; XLA's own is off by more than 4."""
    wide = x.float()
    falling, square = torch.expm1(-2 * wide.abs()), wide * wide
    series = torch.full_like(square, _TANH_SERIES[-1])
    for coefficient in reversed(_TANH_SERIES[:-1]):
        series = series * square + coefficient
    far = torch.sign(wide) * (-falling / (falling + 2))
    return torch.where(wide.abs() < _SERIES_BELOW, wide * series, far).to(x.dtype)


def overrides() -> Mapping[str, Callable[..., Any]]:
    """By op name."""
    return {"gated_activation": gated_activation, "sample": sample, "softcap": softcap}
