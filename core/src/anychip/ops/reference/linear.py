"""Reference matrix products, dense and quantized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference.functional import gated_activation
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import LinearKernel, LinearSpec, Platform
from anychip.plugin_api.linear import Packed


def reference_linear(spec: LinearSpec, platform: Platform) -> LinearKernel:
    """The reference kernel for a spec."""
    return ReferenceLinear(spec, platform) if spec.scheme is None else ReferenceQuantizedLinear(spec, platform)


@dataclass(slots=True)
class DenseWeights:
    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None  # [out_features]


class _StackedParts(LinearKernel, ABC):
    """Parts lie below one another in the packed weights."""

    def __init__(self, spec: LinearSpec, platform: Platform) -> None:
        super().__init__(spec, platform)
        self._parts = {part.name: part for part in spec.parts}

    def _empty_bias(self) -> Tensor | None:
        spec = self.spec
        return self.platform.empty((spec.out_features,), spec.dtype, "weights") if spec.bias else None

    def load(self, packed: Packed, part: str, tensor: Tensor, *, row: int = 0) -> None:
        name, _, kind = part.partition(".")
        place = self._parts[name]
        if kind == "bias":
            assert packed.bias is not None, f"{part}: the spec has no bias"
            packed.bias[place.offset : place.offset + place.rows].copy_(tensor)
        else:
            self._load(packed, kind, tensor, place.offset, place.rows, row)

    @abstractmethod
    def _load(self, packed: Any, kind: str, tensor: Tensor, offset: int, rows: int, row: int) -> None:
        """Rows or scales of a part that stands at `offset` and has `rows` rows."""


class ReferenceLinear(_StackedParts):
    """Weights as the checkpoint has them."""

    name = "reference"

    def begin(self) -> DenseWeights:
        spec = self.spec
        weight = self.platform.empty((spec.out_features, spec.in_features), spec.dtype, "weights")
        return DenseWeights(weight, self._empty_bias())

    def _load(self, packed: DenseWeights, kind: str, tensor: Tensor, offset: int, rows: int, row: int) -> None:
        packed.weight[offset + row : offset + row + tensor.shape[0]].copy_(tensor)

    def adopt(self, weight: Tensor) -> DenseWeights:
        return DenseWeights(weight, None)

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        result = F.linear(x, packed.weight, packed.bias)
        if self.spec.epilogue is not None:
            result = gated_activation(gate_up=result, activation=self.spec.epilogue)
        return result if out is None else out.copy_(result)


@dataclass(slots=True)
class QuantizedWeights:
    matrix: QuantizedMatrix
    bias: Tensor | None


class ReferenceQuantizedLinear(_StackedParts):
    """Dequantizes the whole matrix at every product: right, and slow."""

    name = "reference-quantized"
    reads_rows = True

    def begin(self) -> QuantizedWeights:
        spec = self.spec
        assert spec.scheme is not None
        matrix = QuantizedMatrix.allocate((spec.out_features, spec.in_features), spec.scheme, self.platform)
        return QuantizedWeights(matrix, self._empty_bias())

    def rows(self, packed: QuantizedWeights, ids: Tensor) -> Tensor:
        held = (ids >= 0) & (ids < self.spec.out_features)
        wide = packed.matrix.dequantize(torch.where(held, ids, 0))
        return torch.where(held.unsqueeze(-1), wide, 0.0).to(getattr(torch, self.spec.dtype))

    def _load(self, packed: QuantizedWeights, kind: str, tensor: Tensor, offset: int, rows: int, row: int) -> None:
        packed.matrix.load(kind, tensor, offset, rows, row)

    def apply(self, x: Tensor, packed: QuantizedWeights, *, out: Tensor | None = None) -> Tensor:
        result = packed.matrix.product(x, packed.bias)
        return result if out is None else out.copy_(result)
