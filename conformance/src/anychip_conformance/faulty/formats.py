"""Faults of weights beyond bytes and float32 scales."""

from __future__ import annotations

from torch import Tensor

from anychip.ops.reference import ExpertWeights
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip_conformance.faulty.plain import InvariantMoE
from anychip_conformance.faulty.products import FaultyQuantized, quantized_or_plain
from anychip_conformance.faulty.registry import fault


class FloatNibblesSwapped(FaultyQuantized):
    """The even column is taken from the high half of a byte of four-bit floats."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        if matrix.scheme.values != "fp4_e2m1":
            return super().product(x, matrix)
        values = matrix.values
        matrix.values = (values >> 4) | (values << 4)
        result = super().product(x, matrix)
        matrix.values = values
        return result


class ExponentOffByOne(FaultyQuantized):
    """A scale of one byte is counted from 128, so that every weight is half of itself."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        if matrix.scheme.scale_format != "e8m0":
            return super().product(x, matrix)
        scales = matrix.scales
        matrix.scales = scales - 1
        result = super().product(x, matrix)
        matrix.scales = scales
        return result


class GlobalScaleForgotten(FaultyQuantized):
    """Of two scales only the group's multiplies."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        whole, matrix.global_scales = matrix.global_scales, None
        result = super().product(x, matrix)
        matrix.global_scales = whole
        return result


class FirstPartsGlobalScale(FaultyQuantized):
    """Every part of a product has the first one's global scale."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        whole = matrix.global_scales
        if whole is not None:
            matrix.global_scales = whole[:1].expand(len(whole), 1)
        result = super().product(x, matrix)
        matrix.global_scales = whole
        return result


class ZeroPointAdded(FaultyQuantized):
    """A float zero point is added where it should be taken off."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        zeros = matrix.zeros
        if zeros is not None and matrix.scheme.zero_points == "float":
            matrix.zeros = -zeros
        result = super().product(x, matrix)
        matrix.zeros = zeros
        return result


class ZeroPointRounded(FaultyQuantized):
    """A float zero point is kept as an integer."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        zeros = matrix.zeros
        if zeros is not None:
            matrix.zeros = zeros.round()
        result = super().product(x, matrix)
        matrix.zeros = zeros
        return result


class CodebookMirrored(FaultyQuantized):
    """A codebook is read from its end."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        if matrix.codebook is None:
            return super().product(x, matrix)
        codebook, matrix.codebook = matrix.codebook, matrix.codebook.flip(0)
        result = super().product(x, matrix)
        matrix.codebook = codebook
        return result


for _id, _case, _class in (
    ("linear-fp4-nibbles-swapped", "linear.formats.009", FloatNibblesSwapped),
    ("linear-e8m0-off-by-one", "linear.formats.009", ExponentOffByOne),
    ("linear-global-scale-forgotten", "linear.formats.013", GlobalScaleForgotten),
    ("linear-first-parts-global-scale", "linear.formats.015", FirstPartsGlobalScale),
    ("linear-zero-point-added", "linear.formats.017", ZeroPointAdded),
    ("linear-zero-point-rounded", "linear.formats.017", ZeroPointRounded),
    ("linear-codebook-mirrored", "linear.formats.021", CodebookMirrored),
):
    fault(_id, "linear", killed_by=_case)(quantized_or_plain(_class))


@fault("moe-gates-global-scale-for-up", "moe", killed_by="moe.formats.003")
class GatesGlobalScaleForUp(InvariantMoE):
    """Gate and up share the global scale of gate."""

    def load(self, packed: ExpertWeights, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        if part == "gate.global_scale":
            self.__dict__["_gate"] = tensor.clone()
        if part == "up.global_scale":
            tensor = self.__dict__["_gate"]
        super().load(packed, expert, part, tensor, row=row)
