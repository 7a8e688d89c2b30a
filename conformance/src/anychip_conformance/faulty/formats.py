"""Faults of weights beyond bytes and float32 scales."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from anychip.ops.reference import ExpertWeights
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip_conformance.faulty.plain import InvariantMoE
from anychip_conformance.faulty.products import NibblesSwapped, TakenForAnother, quantized_or_plain
from anychip_conformance.faulty.registry import fault


class FloatNibblesSwapped(NibblesSwapped):
    """The even column is taken from the high half of a byte of four-bit floats."""

    values = "fp4_e2m1"


class ExponentOffByOne(TakenForAnother):
    """A scale of one byte is counted from 128, so that every weight is half of itself."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        return replace(matrix, scales=matrix.scales - 1) if matrix.scheme.scale_format == "e8m0" else matrix


class GlobalScaleForgotten(TakenForAnother):
    """Of two scales only the group's multiplies."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        return replace(matrix, global_scales=None)


class FirstPartsGlobalScale(TakenForAnother):
    """Every part of a product has the first one's global scale."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        whole = matrix.global_scales
        return matrix if whole is None else replace(matrix, global_scales=whole[:1].expand(len(whole), 1))


class ZeroPointAdded(TakenForAnother):
    """A float zero point is added where it should be taken off."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        zeros = matrix.zeros
        if zeros is None or matrix.scheme.zero_points != "float":
            return matrix
        return replace(matrix, zeros=-zeros)


class ZeroPointRounded(TakenForAnother):
    """A float zero point is kept as an integer."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        return matrix if matrix.zeros is None else replace(matrix, zeros=matrix.zeros.round())


class CodebookMirrored(TakenForAnother):
    """A codebook is read from its end."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        return matrix if matrix.codebook is None else replace(matrix, codebook=matrix.codebook.flip(0))


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
