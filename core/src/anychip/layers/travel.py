"""Tokens travel to the ranks of their experts and back. docs/decisions/0059 says when.

A rank without tokens joins, since its experts serve those of others (docs/decisions/0066).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.layers.expert_slots import ExpertSlots
from anychip.plugin_api import Communicator, ExpertParallel, FusedMoE, MeshShape, Platform, Routing
from anychip.plugin_api.linear import Packed


def over_lanes(shape: MeshShape) -> bool:
    """Whether experts lie over ranks that have tokens of their own, so that tokens have to travel."""
    return shape.size_of("dp") > 1 and shape.covers("ep", "dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Travel:
    """Of one mixture's tokens. The ranks along `tp` have the same tokens, and each sends its share of them."""

    kernel: FusedMoE
    slots: ExpertSlots
    ep: ExpertParallel
    tp: Communicator
    nothing: Tensor  # [0, hidden_size]

    @classmethod
    def of(
        cls, platform: Platform, kernel: FusedMoE, slots: ExpertSlots, ep: ExpertParallel, tp: Communicator
    ) -> Travel:
        nothing = platform.empty((0, kernel.spec.hidden_size), kernel.spec.dtype, "weights")
        return cls(kernel=kernel, slots=slots, ep=ep, tp=tp, nothing=nothing)

    def outputs(self, x: Tensor, every: Routing, routed: Tensor | None, packed: Packed) -> Tensor:
        """This rank's part [num_tokens, hidden_size] of the sum along tp. `every` is the routing of all of x's tokens;
        routed [num_tokens] is False for padded tokens."""
        rank, size = self.tp.rank, self.tp.size
        own = slice(len(x) * rank // size, len(x) * (rank + 1) // size)
        share = Routing(every.weights[own], every.expert_ids[own])
        routing = self.slots.pick(share, None if routed is None else routed[own])
        result = torch.zeros_like(x)
        result[own] = self._there_and_back(x[own], routing, packed)
        return result

    def join(self, packed: Packed) -> None:
        """Meets the other ranks in a step for which this one has no tokens, and runs its experts on theirs."""
        choices = self.nothing.new_empty((0, self.kernel.spec.top_k), dtype=torch.float32)
        self._there_and_back(self.nothing, Routing(choices, choices.long()), packed)

    def _there_and_back(self, x: Tensor, routing: Routing, packed: Packed) -> Tensor:
        arrived = self.kernel.dispatch(x, routing, self.ep)
        outputs = self.kernel.experts(arrived.x, arrived.routing, packed)
        return self.kernel.combine(outputs, arrived, routing, self.ep)
