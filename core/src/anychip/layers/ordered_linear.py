"""A product whose columns come in an order of their own, as GPTQ's desc_act leaves them: activations are put into that
order before it, so that the columns of a group lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anychip.errors import CheckpointError
from anychip.plugin_api import LinearKernel, LinearSpec, Platform

ORDER = "order"
"""The kind of a part that says which input each column meets: int64 [in_features]."""


@dataclass(slots=True)
class InOrder:
    inner: Any
    order: Tensor  # [in_features] int64


class OrderedLinear(LinearKernel):
    """Its parts share one order: they are one product of the same activations."""

    def __init__(self, spec: LinearSpec, platform: Platform) -> None:
        super().__init__(spec, platform)
        self._inner = platform.linear(spec)
        self.name = f"{self._inner.name}-ordered"
        self._given: Tensor | None = None

    def begin(self) -> InOrder:
        order = self.platform.empty((self.spec.in_features,), "int64", "weights")
        return InOrder(self._inner.begin(), order.copy_(torch.arange(self.spec.in_features)))

    def load(self, packed: InOrder, part: str, tensor: Tensor, *, row: int = 0) -> None:
        if not part.endswith(f".{ORDER}"):
            self._inner.load(packed.inner, part, tensor, row=row)
            return
        if self._given is None:
            self._given = tensor.clone()
            packed.order.copy_(tensor)
        self._check(part, tensor, self._given)

    def update(self, packed: InOrder, part: str, tensor: Tensor, *, row: int = 0) -> None:
        if part.endswith(f".{ORDER}"):
            self._check(part, tensor, packed.order.cpu())
        else:
            self._inner.update(packed.inner, part, tensor, row=row)

    def _check(self, part: str, order: Tensor, known: Tensor) -> None:
        if not torch.equal(order, known):
            names = ", ".join(each.name for each in self.spec.parts)
            raise CheckpointError(
                f"{part}: the columns of {names} are ordered by activation, each in its own way; they are one product "
                "here and need one order. Quantize the model again without desc_act"
            )

    def finish(self, packed: InOrder) -> InOrder:
        self._given = None
        packed.inner = self._inner.finish(packed.inner)
        return packed

    def apply(self, x: Tensor, packed: InOrder, *, out: Tensor | None = None) -> Tensor:
        return self._inner.apply(x.index_select(1, packed.order), packed.inner, out=out)
