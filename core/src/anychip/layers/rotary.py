"""Rotary tables from a checkpoint's settings.

Sources: Su et al., "RoFormer", 2021 (the embedding); Meta's Llama 3.1 model card and transformers' documentation of
`rope_type: llama3` (the frequency-dependent scaling).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anychip.errors import Unsupported
from anychip.plugin_api import Rope


def make_rope(*, head_dim: int, theta: float, max_positions: int, parameters: dict[str, Any], device: str) -> Rope:
    """cos and sin for every position, float32. Raises Unsupported for a scaling that is not known."""
    rotary_dim = int(head_dim * float(parameters.get("partial_rotary_factor", 1.0)))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequencies = _scaled(1.0 / theta**exponents, parameters)
    angles = torch.outer(torch.arange(max_positions).float(), frequencies)
    return Rope(cos=angles.cos().to(device), sin=angles.sin().to(device), rotary_dim=rotary_dim)


def _scaled(frequencies: Tensor, parameters: dict[str, Any]) -> Tensor:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(parameters["factor"])
    if kind == "llama3":
        return _llama3(frequencies, parameters)
    raise Unsupported("rotary embedding", [f"rope_type {kind!r}; known are default, linear and llama3"])


def _llama3(frequencies: Tensor, parameters: dict[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    original = float(parameters["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, between)
    return torch.where(wavelengths < original / high, frequencies, scaled)
