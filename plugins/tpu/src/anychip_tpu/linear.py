"""Matrix products: weights are loaded on the host and moved to the devices once they are whole, each in its share."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference import (
    DenseWeights,
    ReferenceLinear,
    WidenedLinear,
    can_widen,
    reference_linear,
    with_wide_scales,
)
from anychip.ops.reference.functional import gated_activation
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import NAMED, LinearKernel, LinearSpec, Placed, Platform, Unsupported
from anychip.plugin_api.linear import Packed
from anychip_tpu.runtimes import Runtime

KERNELS = frozenset({"int8", "int4", "fp8-w8a16", "int8-w8a8", "fp8"})
"""Schemes whose weights stay narrow on the device. XLA fuses their widening into the product."""
_HALVES = frozenset({"f16-int8", "f16-int4"})
"""Schemes that become such with float32 scales."""
WIDENED = frozenset(name for name, scheme in NAMED.items() if can_widen(scheme)) - KERNELS - _HALVES
"""Schemes whose weights are widened as they are loaded."""
SCHEMES = KERNELS | _HALVES | WIDENED

T = TypeVar("T")


@dataclass(slots=True)
class Divided:
    """Parts of a product that lie one after another in its rows: each is divided over the devices by itself, so that a
    device's rows of all of them belong together."""

    weights: list[Tensor]  # by part, [rows, in_features]
    bias: Tensor | None  # [out_features]


class XlaLinear(ReferenceLinear):
    """Dense. Parts stay apart where several devices divide their rows."""

    name = "xla"

    def __init__(self, spec: LinearSpec, platform: Platform, runtime: Runtime) -> None:
        super().__init__(spec, platform)
        self._runtime = runtime

    def finish(self, packed: DenseWeights) -> Packed:
        upload, spec = self._runtime.upload, self.spec
        if self._runtime.num_devices == 1 or len(spec.parts) == 1:
            placed = spec.parts[0].placed if len(spec.parts) == 1 else ()
            bias = None if packed.bias is None else upload(packed.bias, _of_rows(placed))
            return DenseWeights(_on_device(packed.weight, self._runtime, placed), bias)
        return Divided(
            [upload(packed.weight[part.offset : part.offset + part.rows], part.placed) for part in spec.parts],
            None if packed.bias is None else upload(packed.bias),
        )

    def adopt(self, weight: Tensor) -> DenseWeights:
        return DenseWeights(weight, None)  # whoever moves the embedding moves this: it is one tensor

    def apply(self, x: Tensor, packed: DenseWeights | Divided, *, out: Tensor | None = None) -> Tensor:
        if isinstance(packed, DenseWeights):
            return super().apply(x, packed, out=out)
        result = torch.cat([F.linear(x, weight) for weight in packed.weights], dim=-1)
        if packed.bias is not None:
            result = result + packed.bias
        if self.spec.epilogue is not None:
            result = gated_activation(gate_up=result, activation=self.spec.epilogue)
        return result if out is None else out.copy_(result)

    def update(self, packed: Packed, part: str, tensor: Tensor, *, row: int = 0) -> None:
        _refuse_update()


class XlaQuantizedLinear(LinearKernel):
    """The reference's quantized product, on the device. It dequantizes within the compiled program."""

    def __init__(self, spec: LinearSpec, platform: Platform, runtime: Runtime) -> None:
        super().__init__(spec, platform)
        self._inner = reference_linear(spec, platform)
        self._accepts = self._inner.accepts
        self._runtime = runtime
        self.name = "xla-quantized"

    def begin(self) -> Packed:
        return self._inner.begin()

    def load(self, packed: Packed, part: str, tensor: Tensor, *, row: int = 0) -> None:
        self._inner.load(packed, part, tensor, row=row)

    def finish(self, packed: Packed) -> Packed:
        parts = self.spec.parts
        placed = parts[0].placed if len({part.placed for part in parts}) == 1 else ()
        return moved(self._inner.finish(packed), self._runtime, placed)

    def apply(self, x: Tensor, packed: Packed, *, out: Tensor | None = None) -> Tensor:
        return self._inner.apply(x, packed, out=out)

    def update(self, packed: Packed, part: str, tensor: Tensor, *, row: int = 0) -> None:
        _refuse_update()


def make_linear(spec: LinearSpec, platform: Platform, runtime: Runtime) -> LinearKernel:
    spec = with_wide_scales(spec)
    if spec.scheme is None:
        return XlaLinear(spec, platform, runtime)
    if spec.scheme.name in WIDENED and can_widen(spec.scheme):
        return WidenedLinear(spec, platform, lambda plain: XlaLinear(plain, platform, runtime))
    return XlaQuantizedLinear(spec, platform, runtime)


def moved(weights: T, runtime: Runtime, placed: Placed) -> T:
    """A dataclass of host tensors and quantized matrices, on the devices. Matrices lie as `placed` says where their
    shape divides; vectors and what is small are whole on each."""
    changes: dict[str, Any] = {}
    for field in fields(weights):  # type: ignore[arg-type]
        value = getattr(weights, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = runtime.upload(value, placed if value.dim() == 2 and min(value.shape) > 1 else ())
        elif isinstance(value, QuantizedMatrix):
            changes[field.name] = moved(value, runtime, placed)
    return replace(weights, **changes)  # type: ignore[type-var]


def _on_device(weight: Tensor, runtime: Runtime, placed: Placed) -> Tensor:
    return runtime.upload(weight, placed) if weight.device.type == "cpu" else weight


def _of_rows(placed: Placed) -> Placed:
    return tuple(each for each in placed if each.dim == 0)


def _refuse_update() -> None:
    raise Unsupported("anychip-tpu", ["weights are not rewritten: Capabilities.reload is none"])
