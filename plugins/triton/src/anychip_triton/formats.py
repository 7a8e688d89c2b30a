"""Activations of 8 bits as one tensor, which a norm or an activation writes and a product reads: bytes, a row's values
and behind them its scales, float32, one for the row or for each group, and up to 12 bytes that align the next row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import ActFormat, LinearSpec
from anychip_triton.shapes import power_of_two

KINDS = {"fp8": "fp8", "int8-w8a8": "int8"}
"""Of a scheme's activations, as kernels name them."""

_ALIGNED = 16


def accepted(spec: LinearSpec) -> ActFormat:
    """What a product takes as it comes; plain values where its activations need no scale of their own."""
    scheme, width = spec.scheme, spec.in_features
    plain = ActFormat(dtype=spec.dtype)
    if scheme is None or scheme.name not in KINDS or width % _ALIGNED:
        return plain
    if scheme.activations == "token":
        return ActFormat(dtype=spec.dtype, scheme=scheme.name)
    size = scheme.group_size
    if scheme.activations == "group" and size and size == power_of_two(size) and width % size == 0:
        return ActFormat(dtype=spec.dtype, scheme=scheme.name, group_size=size)
    return plain


def is_plain(out_format: ActFormat | None) -> bool:
    return out_format is None or out_format.scheme is None


def new_rows(shape: Sequence[int], out_format: ActFormat, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """A tensor for values of a shape, and what kernels are told of it."""
    width = shape[-1]
    scale_bytes = -(-4 * _groups(out_format, width) // _ALIGNED) * _ALIGNED
    made = torch.empty((*shape[:-1], width + scale_bytes), dtype=torch.uint8, device=device)
    values, scales = split_rows(made.view(-1, made.shape[-1]), width, out_format)
    told = {"out": values, "scales": scales, "out_stride": values.stride(0), "scale_stride": scales.stride(0)}
    return made, {**told, "KIND": _kind(out_format), "GROUP": out_format.group_size or 0}


def split_rows(rows: Tensor, width: int, form: ActFormat) -> tuple[Tensor, Tensor]:
    """Values [rows, width] and scales [rows, groups] of rows in a form."""
    values, scales = rows[:, :width], rows[:, width : width + 4 * _groups(form, width)]
    return values.view(torch.int8) if _kind(form) == "int8" else values, scales.view(torch.float32)


def _groups(form: ActFormat, width: int) -> int:
    return width // form.group_size if form.group_size else 1


def _kind(form: ActFormat) -> str:
    assert form.scheme is not None
    return KINDS[form.scheme]
