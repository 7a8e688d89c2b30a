"""Weights of a scheme that a device has no kernels for, dequantized once, as they are loaded: its plain kernels do the
rest. They take the memory of plain weights, and run as fast as those.

The reference's quantized products keep weights narrow instead, and dequantize them at each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import FusedMoE, LinearKernel, LinearSpec, MoESpec, Platform, QuantScheme, Routing
from anychip.plugin_api.linear import Packed


def can_widen(scheme: QuantScheme) -> bool:
    """Whether plain weights stand for the scheme: its activations are not rounded."""
    return scheme.activations == "plain"


SpecT = TypeVar("SpecT", LinearSpec, MoESpec)


def with_wide_scales(spec: SpecT) -> SpecT:
    """For kernels that read float32 scales and no float16 ones: the same product with such scales, which hold float16
    exactly. Its matrix takes float16 parts as they come. Schemes with minima stay as they are."""
    scheme = spec.scheme
    if scheme is None or scheme.scale_format != "float16" or scheme.zero_points == "minima":
        return spec
    return replace(spec, scheme=replace(scheme, scale_format="float32"))


class _Arriving:
    """Matrices of which some kinds are still to come, by key."""

    def __init__(self, scheme: QuantScheme, platform: Platform) -> None:
        self.scheme, self.platform = scheme, platform
        self.kinds = {"scale"}
        self.kinds |= {"global_scale"} if scheme.scale_format == "e4m3" else set()
        self.kinds |= {"super_scale"} if scheme.super_group_size else set()
        if scheme.zero_points == "minima":
            self.kinds |= {"minimum", "super_minimum"} if scheme.super_group_size else {"minimum"}
        elif scheme.zero_points:
            self.kinds |= {"zero"}
        self._matrices: dict[Any, QuantizedMatrix] = {}
        self._missing: dict[Any, set[str]] = {}
        self._rows: dict[Any, int] = {}

    def add(self, key: Any, shape: tuple[int, int], kind: str, tensor: Tensor, row: int) -> Tensor | None:
        """The matrix [rows, columns] float32 with the last kind that it waited for, None before."""
        matrix = self._matrices.get(key)
        if matrix is None:
            matrix = self._matrices[key] = QuantizedMatrix.allocate(shape, self.scheme, self.platform)
            self._missing[key], self._rows[key] = set(self.kinds), shape[0]
        matrix.load(kind, tensor, 0, shape[0], row)
        if kind == "":
            self._rows[key] -= len(tensor)
        else:
            self._missing[key].discard(kind)
        if self._rows[key] or self._missing[key]:
            return None
        del self._missing[key], self._rows[key]
        return self._matrices.pop(key).dequantize()


class WidenedLinear(LinearKernel):
    """`make` gives the plain kernel. What is packed is that kernel's."""

    def __init__(self, spec: LinearSpec, platform: Platform, make: Callable[[LinearSpec], LinearKernel]) -> None:
        super().__init__(spec, platform)
        assert spec.scheme is not None and can_widen(spec.scheme)
        self._plain = make(replace(spec, scheme=None))
        self._accepts = self._plain.accepts
        self._arriving = _Arriving(spec.scheme, platform)
        self._rows = {part.name: part.rows for part in spec.parts}
        self.name = f"{self._plain.name}-widened"

    def begin(self) -> Packed:
        return self._plain.begin()

    def load(self, packed: Packed, part: str, tensor: Tensor, *, row: int = 0) -> None:
        self._take(self._plain.load, packed, part, tensor, row)

    def update(self, packed: Packed, part: str, tensor: Tensor, *, row: int = 0) -> None:
        """The part is rewritten once all of its kinds are there."""
        self._take(self._plain.update, packed, part, tensor, row)

    def _take(self, give: Callable[..., None], packed: Packed, part: str, tensor: Tensor, row: int) -> None:
        name, _, kind = part.partition(".")
        if kind == "bias":
            give(packed, part, tensor)
            return
        shape = (self._rows[name], self.spec.in_features)
        matrix = self._arriving.add(name, shape, kind, tensor, row)
        if matrix is not None:
            give(packed, name, matrix.to(getattr(torch, self.spec.dtype)))

    def finish(self, packed: Packed) -> Packed:
        return self._plain.finish(packed)

    def apply(self, x: Tensor, packed: Packed, *, out: Tensor | None = None) -> Tensor:
        return self._plain.apply(x, packed, out=out)


class WidenedMoE(FusedMoE):
    """`make` gives the plain experts. What is packed is theirs."""

    def __init__(self, spec: MoESpec, platform: Platform, make: Callable[[MoESpec], FusedMoE]) -> None:
        super().__init__(spec, platform)
        assert spec.scheme is not None and can_widen(spec.scheme)
        self._plain = make(replace(spec, scheme=None))
        self._arriving = _Arriving(spec.scheme, platform)
        self.name = f"{self._plain.name}-widened"

    def begin(self) -> Packed:
        return self._plain.begin()

    def load(self, packed: Packed, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        self._take(self._plain.load, packed, expert, part, tensor, row)

    def update(self, packed: Packed, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        """The part is rewritten once all of its kinds are there."""
        self._take(self._plain.update, packed, expert, part, tensor, row)

    def _take(
        self, give: Callable[..., None], packed: Packed, expert: int, part: str, tensor: Tensor, row: int
    ) -> None:
        name, _, kind = part.partition(".")
        if kind == "bias":
            give(packed, expert, part, tensor)
            return
        wide, tall = self.spec.intermediate_size, self.spec.hidden_size
        shape = (tall, wide) if name == "down" else (wide, tall)
        matrix = self._arriving.add((expert, name), shape, kind, tensor, row)
        if matrix is not None:
            give(packed, expert, name, matrix.to(getattr(torch, self.spec.dtype)))

    def finish(self, packed: Packed) -> Packed:
        return self._plain.finish(packed)

    @property
    def has_products(self) -> bool:
        return self._plain.has_products

    def product(self, x: Tensor, expert_ids: Tensor, packed: Packed, part: Literal["gate_up", "down"]) -> Tensor:
        return self._plain.product(x, expert_ids, packed, part)

    def expert_tensors(self, packed: Packed, expert: int) -> Sequence[Tensor]:
        return self._plain.expert_tensors(packed, expert)

    def remap(self, packed: Packed, expert_map: Tensor) -> Packed:
        return self._plain.remap(packed, expert_map)

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        return self._plain.route(router_logits, bias)

    def experts(self, x: Tensor, routing: Routing, packed: Packed, *, expert_map: Tensor | None = None) -> Tensor:
        return self._plain.experts(x, routing, packed, expert_map=expert_map)

    def apply(self, x: Tensor, router_logits: Tensor, packed: Packed, **options: Any) -> Tensor:
        return self._plain.apply(x, router_logits, packed, **options)
