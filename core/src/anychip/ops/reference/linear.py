"""Reference dense matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from anychip.plugin_api import LinearKernel, LinearSpec, Platform, Unsupported


@dataclass(slots=True)
class DenseWeights:
    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None  # [out_features]


class ReferenceLinear(LinearKernel):
    """Weights as the checkpoint has them, parts stacked."""

    name = "reference"

    def __init__(self, spec: LinearSpec, platform: Platform) -> None:
        if spec.scheme is not None:
            raise Unsupported("reference linear", [f"quantization scheme {spec.scheme!r} has no reference yet"])
        super().__init__(spec, platform)
        self._parts = {part.name: part for part in spec.parts}

    def begin(self) -> DenseWeights:
        spec = self.spec
        weight = self.platform.empty((spec.out_features, spec.in_features), spec.dtype, "weights")
        bias = self.platform.empty((spec.out_features,), spec.dtype, "weights") if spec.bias else None
        return DenseWeights(weight, bias)

    def load(self, packed: DenseWeights, part: str, tensor: Tensor) -> None:
        name, _, kind = part.partition(".")
        target = packed.bias if kind == "bias" else packed.weight
        place = self._parts[name]
        assert target is not None, f"{part}: the spec has no bias"
        target[place.offset : place.offset + place.rows].copy_(tensor)

    def adopt(self, weight: Tensor) -> DenseWeights:
        return DenseWeights(weight, None)

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        result = F.linear(x, packed.weight, packed.bias)
        return result if out is None else out.copy_(result)
