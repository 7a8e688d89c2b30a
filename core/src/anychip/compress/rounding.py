"""The stored numbers of one matrix, each weight rounded to the nearest that its scale allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.ops.reference.canonical import dequantize
from anychip.ops.reference.quantized import INT8_MAX, to_fp8
from anychip.plugin_api import FP8_MAX, INT4_ZERO, QuantScheme

_TINY = 1e-12
"""Least scale: a group of zeros stays zeros."""

_INT4_MAX = 7.5
"""Half of the range -8 to 7: a group's greatest magnitude is between two ends that differ."""

_MOST = {"int4": _INT4_MAX, "int8": INT8_MAX, "fp8_e4m3": FP8_MAX}


@dataclass(slots=True)
class Rounded:
    """A matrix in canonical form: `values` [rows, columns], `scale` [rows] or [rows, groups] float32."""

    scheme: QuantScheme
    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """[rows, columns] float32."""
        return dequantize(self.scheme, self.values, self.scale)


def scales_of(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """Scales [rows] or [rows, groups] of weights [rows, columns], by each part's greatest magnitude."""
    wide = weight.float()
    parts = wide if scheme.group_size is None else wide.view(len(wide), -1, scheme.group_size)
    return parts.abs().amax(dim=-1).clamp(min=_TINY) / _MOST[scheme.values]


def stored(weight: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """Canonical values of weights, by scales that broadcast over them."""
    scaled = weight / scale
    if scheme.values == "fp8_e4m3":
        return to_fp8(scaled)
    if scheme.values == "int8":
        return scaled.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return (scaled.round() + INT4_ZERO).clamp(0, 2 * INT4_ZERO - 1).to(torch.uint8)


def round_to_nearest(weight: Tensor, scheme: QuantScheme) -> Rounded:
    """Weights [rows, columns] of any floating dtype."""
    wide, scale = weight.float(), scales_of(weight, scheme)
    if scheme.group_size is None:
        return Rounded(scheme, stored(wide, scale.unsqueeze(-1), scheme), scale)
    groups = wide.view(len(wide), -1, scheme.group_size)
    return Rounded(scheme, stored(groups, scale.unsqueeze(-1), scheme).flatten(1), scale)
