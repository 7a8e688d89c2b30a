"""Faults of matrix products, dense and quantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import DenseWeights
from anychip.ops.reference.linear import QuantizedWeights, ReferenceQuantizedLinear
from anychip.ops.reference.quantized import QuantizedMatrix, round_activations
from anychip.plugin_api import LinearKernel, LinearSpec, Platform
from anychip_conformance.faulty.plain import PlainLinear
from anychip_conformance.faulty.registry import fault

# -- dense products ------------------------------------------------------------------------------------------


@fault("linear-keeps-the-callers-buffer", "linear", killed_by="linear.dense.001")
class KeepsTheCallersBuffer(PlainLinear):
    """Loaded rows are remembered where they lie, and read after their storage was reused."""

    def begin(self) -> DenseWeights:
        self._views: list[tuple[int, Tensor]] = []
        return super().begin()

    def load(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        if part.endswith(".bias"):
            super().load(packed, part, tensor, row=row)
        else:
            self._views.append((self._parts[part].offset + row, tensor))

    def finish(self, packed: DenseWeights) -> DenseWeights:
        for start, view in self._views:
            packed.weight[start : start + len(view)] = view
        return packed


@fault("linear-load-ignores-row", "linear", killed_by="linear.dense.007")
class LoadIgnoresRow(PlainLinear):
    """Every chunk of a matrix is put at its beginning."""

    def load(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        super().load(packed, part, tensor)


@fault("linear-parts-overlap", "linear", killed_by="linear.dense.004")
class PartsOverlap(PlainLinear):
    """Every part is put at the first one's place."""

    def load(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        super().load(packed, self.spec.parts[0].name if "." not in part else part, tensor, row=row)


@fault("linear-bias-skipped-in-decode", "linear", killed_by="linear.dense.004")
class BiasSkippedInDecode(PlainLinear):
    """The path for one token forgets the bias."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        if len(x) == 1:
            packed = DenseWeights(packed.weight, None)
        return super().apply(x, packed, out=out)


@fault("linear-update-not-seen", "linear", killed_by="linear.update.001")
class UpdateNotSeen(PlainLinear):
    """Products go on with the weights of before."""

    def update(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        self.load(DenseWeights(packed.weight.clone(), packed.bias), part, tensor, row=row)


@fault("linear-out-ignored", "linear", killed_by="linear.dense.007")
class OutIgnored(PlainLinear):
    """The caller's storage stays as it was."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        return super().apply(x, packed)


@fault("linear-sums-in-bf16", "linear", killed_by="linear.dense.011")
class SumsInBf16(PlainLinear):
    """Partial sums over columns are rounded to the dtype."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        total = x.new_zeros(len(x), self.spec.out_features)
        for column in range(0, x.shape[1], 8):
            total = total + x[:, column : column + 8] @ packed.weight[:, column : column + 8].T
        total = total if packed.bias is None else total + packed.bias
        return total if out is None else out.copy_(total)


@fault("linear-epilogue-takes-up-for-gate", "linear", killed_by="linear.epilogue.001")
class EpilogueTakesUpForGate(PlainLinear):
    """The activation is of the half that it should multiply."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        if self.spec.epilogue is not None:
            packed = DenseWeights(packed.weight.roll(len(packed.weight) // 2, 0), packed.bias)
        return super().apply(x, packed, out=out)


@fault("linear-varies-with-the-batch", "linear", killed_by="linear.batch_invariant.001")
class VariesWithTheBatch(PlainLinear):
    """Sums are split by the number of tokens, while batch invariance is declared."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        half = x.shape[1] // 2 if len(x) > 8 else 0
        total = x[:, half:] @ packed.weight[:, half:].T
        if half:
            total = total + x[:, :half] @ packed.weight[:, :half].T
        total = total if packed.bias is None else total + packed.bias
        return total if out is None else out.copy_(total)


# -- quantized products --------------------------------------------------------------------------------------


class FaultyQuantized(ReferenceQuantizedLinear):
    """Quantized specs with `product` replaced; dense ones are honest."""

    def apply(self, x: Tensor, packed: QuantizedWeights, *, out: Tensor | None = None) -> Tensor:
        result = self.product(x, packed.matrix)
        result = result if packed.bias is None else result + packed.bias
        return result if out is None else out.copy_(result)

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        return matrix.product(x, None)


def quantized_or_plain(faulty: type[FaultyQuantized]) -> Any:
    """A factory with the fault's docstring."""

    def make(spec: LinearSpec, platform: Platform) -> LinearKernel:
        return PlainLinear(spec, platform) if spec.scheme is None else faulty(spec, platform)

    make.__doc__ = faulty.__doc__
    return make


class RowAndColumnScalesSwapped(FaultyQuantized):
    """An fp8 product is scaled by the weights' scales along its rows, and by the tokens' along its columns."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        scales = matrix.scales.flatten()
        if matrix.scheme.values != "fp8_e4m3" or matrix.scheme.scales != "channel" or len(x) < 2:
            return super().product(x, matrix)
        honest = super().product(x, matrix).float()
        return (honest / scales * scales[torch.arange(len(x)) % len(scales)].unsqueeze(-1)).to(x.dtype)


class TakenForAnother(FaultyQuantized):
    """A fault multiplies by another matrix than the one that was loaded."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        return super().product(x, self.taken_for(matrix))

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        raise NotImplementedError


class ZeroPointsIgnored(TakenForAnother):
    """The zero of int4 is always eight."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        return replace(matrix, zeros=None)


class NextGroupsScale(TakenForAnother):
    """Each group of columns is scaled by the next one's scale."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        return replace(matrix, scales=matrix.scales.roll(-1, dims=1))


class NibblesSwapped(TakenForAnother):
    """The even column is taken from the high half of an int4 byte."""

    values = "int4"

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        if matrix.scheme.values != self.values:
            return matrix
        return replace(matrix, values=(matrix.values >> 4) | (matrix.values << 4))


class OneScaleForAllTokens(FaultyQuantized):
    """Activations that have a scale for each token are rounded with the largest of them, and coarser still."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        if matrix.scheme.activations != "token":
            return super().product(x, matrix)
        scale = x.float().abs().max() / 7.0
        coarse = (x.float() / scale).round() * scale
        return (coarse @ matrix.dequantize().T).to(x.dtype)


class StaticScaleIgnored(FaultyQuantized):
    """The checkpoint's scale of activations is taken for one."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        if matrix.scheme.activations != "static" or matrix.input_scale is None:
            return super().product(x, matrix)
        rounded = round_activations(x, matrix.scheme, torch.ones_like(matrix.input_scale) * 0.25)
        return (rounded @ matrix.dequantize().T * matrix.input_scale * 4).to(x.dtype)


for _id, _case, _class in (
    ("linear-fp8-scales-swapped", "linear.quantized.031", RowAndColumnScalesSwapped),
    ("linear-zero-points-ignored", "linear.quantized.017", ZeroPointsIgnored),
    ("linear-next-groups-scale", "linear.quantized.013", NextGroupsScale),
    ("linear-nibbles-swapped", "linear.quantized.013", NibblesSwapped),
    ("linear-one-scale-for-all-tokens", "linear.quantized.039", OneScaleForAllTokens),
    ("linear-static-scale-ignored", "linear.quantized.025", StaticScaleIgnored),
):
    fault(_id, "linear", killed_by=_case)(quantized_or_plain(_class))
