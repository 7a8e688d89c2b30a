"""Reference quantization: rounding to a plugin_api.QuantScheme, and a matrix kept in one.

Products are taken in float32 of the dequantized weights, so the only error beyond the scheme's own is float32's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.ops.reference.canonical import dequantize
from anychip.plugin_api import FP8_MAX, INT4_ZERO, SCALES, VALUES, QuantScheme
from anychip.plugin_api.memory import DeviceMemory
from anychip.types import cdiv

INT8_MAX = 127.0
_TINY = 1e-12
"""Least scale: a group of zeros stays zeros."""


def quantize_rows(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Symmetric int8 or fp8 by channel, int4 or mxfp4 by group, rounded to nearest: canonical values and scales of
    whole rows [rows, in_features]."""
    return _ROUNDED[scheme.values](weight.float(), scheme)


def _round_int8(wide: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    scale = wide.abs().amax(dim=1).clamp(min=_TINY) / INT8_MAX
    return (wide / scale.unsqueeze(-1)).round().to(torch.int8), scale


def _round_fp8(wide: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    scale = wide.abs().amax(dim=1).clamp(min=_TINY) / FP8_MAX
    return to_fp8(wide / scale.unsqueeze(-1)), scale


def _round_int4(wide: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    assert scheme.group_size is not None
    groups = wide.reshape(len(wide), -1, scheme.group_size)
    # The value of greatest magnitude becomes -8, the end of the range that the other side lacks.
    index = groups.abs().argmax(dim=-1, keepdim=True)
    scale = groups.gather(-1, index) / -float(INT4_ZERO)
    scale = torch.where(scale.abs() < _TINY, torch.full_like(scale, _TINY), scale)
    values = ((groups / scale).round() + INT4_ZERO).clamp(0, 15).to(torch.uint8)
    return values.flatten(1), scale.squeeze(-1)


def _round_mxfp4(wide: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """The scale puts a group's greatest magnitude between 4, the last power of two of e2m1, and 8; what then lies above
    6, the last number, becomes 6. Of two numbers equally near, the one with an even code is taken. Source: OCP,
    "Microscaling Formats (MX) v1.0", section 6.3."""
    assert scheme.group_size is not None and scheme.scale_format == "e8m0"
    groups = wide.reshape(len(wide), -1, scheme.group_size)
    _, above = torch.frexp(groups.abs().amax(dim=-1))  # amax is below 2^above, and at least half of that
    exponent = (above - 3).clamp(-127, 127)
    scaled = torch.ldexp(groups, -exponent.unsqueeze(-1))
    magnitude = scaled.abs()
    codes = torch.bucketize(magnitude, magnitude.new_tensor(_E2M1_MIDDLES))  # the lower code of two
    codes += torch.isin(magnitude, magnitude.new_tensor(_E2M1_MIDDLES[1::2]))
    values = (codes + 8 * scaled.signbit()).to(torch.uint8)
    return values.flatten(1), (exponent + 127).to(torch.uint8)


_E2M1_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Between the numbers of e2m1. Of every second one, the upper number has the even code."""

_ROUNDED = {"int8": _round_int8, "int4": _round_int4, "fp8_e4m3": _round_fp8, "fp4_e2m1": _round_mxfp4}


def to_fp8(x: Tensor) -> Tensor:
    """Nearest float8_e4m3fn; what lies outside its range becomes its largest value."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def round_activations(x: Tensor, scheme: QuantScheme, input_scale: Tensor | None) -> Tensor:
    """Activations [num_tokens, in_features] as the scheme's product sees them, dequantized to float32."""
    wide = x.float()
    if scheme.activations == "plain":
        return wide
    if scheme.activations == "static":
        assert input_scale is not None
        return to_fp8(wide / input_scale).float() * input_scale
    most = INT8_MAX if scheme.activation_format == "int8" else FP8_MAX
    size = scheme.group_size if scheme.activations == "group" and scheme.group_size else wide.shape[-1]
    columns = wide.shape[-1]
    padded = torch.nn.functional.pad(wide, (0, -columns % size)).view(len(wide), cdiv(columns, size), size)
    scale = padded.abs().amax(dim=-1, keepdim=True).clamp(min=_TINY) / most
    scaled = padded / scale
    rounded = scaled.round() if scheme.activation_format == "int8" else to_fp8(scaled).float()
    return (rounded * scale).flatten(1)[:, :columns]


@dataclass(slots=True)
class QuantizedMatrix:
    """`shape` = (rows, columns) in a scheme. Values of at most four bits lie two to a byte, the even column in the low
    half; scales and zeros lie by row, in their canonical dtypes."""

    scheme: QuantScheme
    shape: tuple[int, int]
    values: Tensor
    scales: Tensor  # [rows, groups]: one group where the scheme has none
    zeros: Tensor | None  # [rows, groups]
    input_scale: Tensor | None  # [1]
    global_scales: Tensor | None = None  # [rows, 1] float32
    super_scales: Tensor | None = None  # [rows, super-groups] float16
    minima: Tensor | None = None  # [rows, groups]
    super_minima: Tensor | None = None  # [rows, super-groups] float16
    codebook: Tensor | None = None  # [2^bits] float32

    @classmethod
    def allocate(cls, shape: tuple[int, int], scheme: QuantScheme, platform: DeviceMemory) -> QuantizedMatrix:
        rows, columns = shape
        groups = cdiv(columns, scheme.group_size) if scheme.group_size else 1
        width = cdiv(columns, 2) if scheme.bits <= 4 else columns

        def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
            return platform.empty(shape, dtype, "weights")

        codebook = None
        if scheme.codebook:
            codebook = empty((len(scheme.codebook),), "float32").copy_(torch.tensor(scheme.codebook))
        zero_dtype = {None: None, "int": "uint8", "float": "float32", "minima": None}[scheme.zero_points]
        minima = scheme.zero_points == "minima"
        upper = cdiv(columns, scheme.super_group_size) if scheme.super_group_size else 0
        return cls(
            scheme=scheme,
            shape=shape,
            values=empty((rows, width), VALUES[scheme.values].dtype),
            scales=empty((rows, groups), SCALES[scheme.scale_format].dtype),
            zeros=empty((rows, groups), zero_dtype) if zero_dtype else None,
            input_scale=empty((1,), "float32").zero_() if scheme.activations == "static" else None,
            global_scales=empty((rows, 1), "float32") if scheme.scale_format == "e4m3" else None,
            super_scales=empty((rows, upper), "float16") if upper else None,
            minima=empty((rows, groups), SCALES[scheme.scale_format].dtype) if minima else None,
            super_minima=empty((rows, upper), "float16") if minima and upper else None,
            codebook=codebook,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """What was loaded."""
        parts = (self.values, self.scales, self.zeros, self.input_scale, self.global_scales)
        return [part for part in parts if part is not None]

    def load(self, kind: str, tensor: Tensor, offset: int, rows: int, row: int) -> None:
        """One kind of a part that stands at `offset` and has `rows` rows; `row` as in LinearKernel.load."""
        if kind == "":
            place = slice(offset + row, offset + row + tensor.shape[0])
            self.values[place].copy_(_paired(tensor) if self.scheme.bits <= 4 else tensor)
        elif kind == "scale":
            self.scales[offset : offset + rows].copy_(self._by_row(tensor, rows))
        elif kind == "global_scale":
            assert self.global_scales is not None
            self.global_scales[offset : offset + rows].copy_(tensor.view(1, 1).expand(rows, -1))
        elif kind in _BY_ROW:
            held = getattr(self, _BY_ROW[kind])
            held[offset : offset + rows].copy_(self._by_row(tensor, rows) if kind in ("zero", "minimum") else tensor)
        else:
            assert kind == "input_scale" and self.input_scale is not None, kind
            # Parts of one product see the same activations: the widest range holds them all.
            torch.maximum(self.input_scale, tensor.to(self.input_scale.device).view(1), out=self.input_scale)

    def _by_row(self, tensor: Tensor, rows: int) -> Tensor:
        if self.scheme.scales == "block":
            assert self.scheme.group_size is not None
            return tensor.repeat_interleave(self.scheme.group_size, dim=0)[:rows]
        return tensor.view(-1, self.scales.shape[1]).expand(rows, -1)

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """[rows, columns] float32: all of them, or those of the indices `rows`."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or rows is None else tensor.index_select(0, rows)

        values = self.values if rows is None else self.values.index_select(0, rows)
        if self.scheme.bits <= 4:
            halves = torch.stack((values & 15, values >> 4), dim=-1)
            values = halves.flatten(1)[:, : self.shape[1]]
        return dequantize(
            self.scheme,
            values,
            self.scales if rows is None else self.scales.index_select(0, rows),
            global_scale=some(self.global_scales),
            super_scale=some(self.super_scales),
            zero=some(self.zeros),
            minimum=some(self.minima),
            super_minimum=some(self.super_minima),
            codebook=self.codebook,
        )

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b in the activations' dtype."""
        rounded = round_activations(x, self.scheme, self.input_scale)
        result = rounded @ self.dequantize().T
        return (result if bias is None else result + bias.float()).to(x.dtype)


_BY_ROW = {
    "zero": "zeros", "minimum": "minima", "super_scale": "super_scales", "super_minimum": "super_minima",
}  # fmt: skip
"""By kind, where a matrix holds it."""


def _paired(values: Tensor) -> Tensor:
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, 0::2] | values[:, 1::2] << 4
