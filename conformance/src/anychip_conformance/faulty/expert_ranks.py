"""Faults of experts on several ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anychip.ops.reference import ExpertWeights
from anychip.plugin_api import Dispatched, ExpertParallel, Routing
from anychip_conformance.faulty.plain import InvariantMoE
from anychip_conformance.faulty.registry import fault


@fault("moe-rows-have-top-k", "moe", killed_by="moe.dispatched_rows.001")
class RowsHaveTopK(InvariantMoE):
    """The spec's top_k is taken for the number of a row's choices: a single one counts so often."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        choices = self.spec.top_k // max(1, routing.expert_ids.shape[1])
        return super().experts(x, routing, packed, expert_map=expert_map) * choices


@fault("moe-move-forgets-down", "moe", killed_by="moe.moved_expert.001")
class MoveForgetsDown(InvariantMoE):
    """An expert moves without its second matrix."""

    def expert_tensors(self, packed: ExpertWeights, expert: int) -> list[Tensor]:
        return [each for each in super().expert_tensors(packed, expert) if each is not packed.down[expert]]


@fault("moe-moved-into-a-copy", "moe", killed_by="moe.moved_expert.001")
class MovedIntoACopy(InvariantMoE):
    """What an expert moves into is a copy, which nobody reads."""

    def expert_tensors(self, packed: ExpertWeights, expert: int) -> list[Tensor]:
        return [each.clone() for each in super().expert_tensors(packed, expert)]


@fault("moe-move-forgets-scales", "moe", killed_by="moe.moved_expert.008")
class MoveForgetsScales(InvariantMoE):
    """An expert of integers leaves its scales behind."""

    def expert_tensors(self, packed: ExpertWeights, expert: int) -> list[Tensor]:
        found = super().expert_tensors(packed, expert)
        return found if self.spec.scheme is None else [each for each in found if not each.is_floating_point()]


@fault("moe-combine-as-sent", "moe", killed_by="moe.dispatch.001")
class CombinedAsSent(InvariantMoE):
    """Outputs are taken back in the order in which they were sent, as if that were the order of the choices."""

    def combine(self, outputs: Tensor, dispatched: Dispatched, routing: Routing, ep: ExpertParallel) -> Tensor:
        straight = replace(dispatched, choices=dispatched.choices.sort().values)
        return super().combine(outputs, straight, routing, ep)


@fault("moe-padding-routed", "moe", killed_by="moe.dispatch.001")
class PaddingRouted(InvariantMoE):
    """Padded tokens go to the first expert."""

    def dispatch(self, x: Tensor, routing: Routing, ep: ExpertParallel) -> Dispatched:
        return super().dispatch(x, Routing(routing.weights, routing.expert_ids.clamp(min=0)), ep)


@fault("moe-combine-without-weights", "moe", killed_by="moe.dispatch.001")
class CombinedWithoutWeights(InvariantMoE):
    """The outputs of a token's experts are added as they are."""

    def combine(self, outputs: Tensor, dispatched: Dispatched, routing: Routing, ep: ExpertParallel) -> Tensor:
        return super().combine(outputs, dispatched, Routing(torch.ones_like(routing.weights), routing.expert_ids), ep)
