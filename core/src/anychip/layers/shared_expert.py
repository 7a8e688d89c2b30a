"""Experts that the router picks, beside a feed-forward block that every token takes."""

from __future__ import annotations

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ReplicatedLinear
from anychip.layers.mlp import GatedMLP, SparseMoE
from anychip.plugin_api import ActFormat


class WithSharedExpert:
    """experts(x) + shared(x), or experts(x) + sigmoid(gate x) * shared(x) where `gate` names the gate's module."""

    def __init__(
        self, builder: Builder, *, experts: SparseMoE, shared: GatedMLP, hidden_size: int, gate: str | None = None
    ) -> None:
        self.experts = experts
        self.shared = shared
        self.gate: ReplicatedLinear | None = None
        if gate is not None:
            self.gate = ReplicatedLinear(builder, name=gate, in_features=hidden_size, out_features=1)

    @property
    def accepts(self) -> ActFormat:
        return self.experts.accepts

    def __call__(self, x: Tensor) -> Tensor:
        shared = self.shared(x)
        if self.gate is not None:
            shared = self.gate(x).sigmoid() * shared
        return self.experts(x) + shared
