"""Faults of mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import ExpertWeights
from anychip.plugin_api import Routing
from anychip_conformance.faulty.plain import InvariantMoE
from anychip_conformance.faulty.registry import fault


@fault("moe-not-renormalised", "moe", killed_by="moe.route.001")
class NotRenormalised(InvariantMoE):
    """Weights of the picked experts do not sum to one."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        scores = router_logits.float().softmax(dim=-1)
        return Routing(scores.gather(-1, honest.expert_ids) * self.spec.router_scale, honest.expert_ids)


@fault("moe-softmax-after-top-k", "moe", killed_by="moe.route.004")
class SoftmaxAfterTopK(InvariantMoE):
    """The softmax is over the picked experts instead of over all."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        picked = router_logits.float().gather(-1, honest.expert_ids)
        return Routing(picked.softmax(dim=-1) * self.spec.router_scale, honest.expert_ids)


@fault("moe-scale-ignored", "moe", killed_by="moe.route.007")
class RouterScaleIgnored(InvariantMoE):
    """The router's scale is left out."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        return Routing(honest.weights / self.spec.router_scale, honest.expert_ids)


@fault("moe-groups-ignored", "moe", killed_by="moe.route.010")
class GroupsIgnored(InvariantMoE):
    """Experts are picked from all groups."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        scores = router_logits.float()
        scores = scores.softmax(dim=-1) if self.spec.scoring == "softmax" else scores.sigmoid()
        ids = (scores if bias is None else scores + bias).topk(self.spec.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        if self.spec.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(weights * self.spec.router_scale, ids)


@fault("moe-correction-weighs", "moe", killed_by="moe.route.016")
class CorrectionWeighs(InvariantMoE):
    """The correction for picking enters the weights."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        if bias is None:
            return honest
        weights = honest.weights + bias[honest.expert_ids]
        return Routing(weights / weights.sum(dim=-1, keepdim=True), honest.expert_ids)


@fault("moe-map-wraps", "moe", killed_by="moe.expert_map.001")
class MapWraps(InvariantMoE):
    """-1 in the expert map is the last expert held here."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        wrapped = None if expert_map is None else expert_map.where(expert_map >= 0, len(packed.gate_up) - 1)
        return super().experts(x, routing, packed, expert_map=wrapped)


@fault("moe-local-experts-one-short", "moe", killed_by="moe.local_experts.001")
class LocalExpertsOneShort(InvariantMoE):
    """The last expert that is held here is taken for one of another rank."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        if expert_map is not None and self.spec.num_local_experts is not None:
            expert_map = expert_map.masked_fill(expert_map == self.spec.num_held - 1, -1)
        return super().experts(x, routing, packed, expert_map=expert_map)


@fault("moe-map-ignored", "moe", killed_by="moe.expert_map.001")
class MapIgnored(InvariantMoE):
    """Expert ids are taken for places, whatever the map says."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        ids = routing.expert_ids % len(packed.gate_up)
        return super().experts(x, Routing(routing.weights, ids), packed)


@fault("moe-empty-expert-garbage", "moe", killed_by="moe.experts.010")
class EmptyExpertGarbage(InvariantMoE):
    """An expert without tokens leaves what its workspace held."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        result = super().experts(x, routing, packed, expert_map=expert_map)
        empty = len(packed.gate_up) - len(set(routing.expert_ids.flatten().tolist()))
        if empty > len(packed.gate_up) // 2 and len(result):
            result[0] += 1.0
        return result


@fault("moe-gate-and-up-swapped", "moe", killed_by="moe.experts.001")
class GateAndUpSwapped(InvariantMoE):
    """The halves of the first product are loaded in the other order."""

    def load(self, packed: ExpertWeights, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        name, dot, kind = part.partition(".")
        swapped = {"gate": "up", "up": "gate"}.get(name, name)
        super().load(packed, expert, swapped + dot + kind, tensor, row=row)


@fault("moe-weight-twice", "moe", killed_by="moe.experts.001")
class WeightTwice(InvariantMoE):
    """The router's weight multiplies each share twice."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        return super().experts(x, Routing(routing.weights.square(), routing.expert_ids), packed, expert_map=expert_map)


@fault("moe-weight-on-input", "moe", killed_by="moe.experts.001")
class WeightOnInput(InvariantMoE):
    """The router's weight multiplies what goes into an expert instead of what comes out."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        total = torch.zeros_like(x)
        for choice in range(routing.expert_ids.shape[1]):
            weight, ids = routing.weights[:, choice : choice + 1], routing.expert_ids[:, choice : choice + 1]
            one = Routing(torch.ones_like(weight), ids)
            total = total + super().experts((x * weight).to(x.dtype), one, packed, expert_map=expert_map)
        return total


@fault("moe-shared-dropped", "moe", killed_by="moe.experts.019")
class SharedDropped(InvariantMoE):
    """The shared experts' output is not added."""

    def apply(
        self, x: Tensor, router_logits: Tensor, packed: Any, *, shared: Tensor | None = None, **rest: Any
    ) -> Tensor:
        return super().apply(x, router_logits, packed, **rest)


@fault("moe-last-token-dropped", "moe", killed_by="moe.experts.007")
class LastTokenDropped(InvariantMoE):
    """Of an odd number of tokens beyond a tile, the last is left out."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        result = super().experts(x, routing, packed, expert_map=expert_map)
        if len(x) > 16 and len(x) % 2:
            result[-1] = 0
        return result


@fault("moe-first-experts-scales", "moe", killed_by="moe.quantized.001")
class FirstExpertsScales(InvariantMoE):
    """Every expert's integers are scaled by the first one's scales."""

    def load(self, packed: ExpertWeights, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        if part.endswith(".scale"):
            first: dict[str, Tensor] = self.__dict__.setdefault("_first", {})
            tensor = first.setdefault(part, tensor.clone())
        super().load(packed, expert, part, tensor, row=row)


@fault("moe-varies-with-the-batch", "moe", killed_by="moe.batch_invariant.001")
class MoeVariesWithTheBatch(InvariantMoE):
    """Larger batches sum in another order, while batch invariance is declared."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        result = super().experts(x, routing, packed, expert_map=expert_map)
        return result * (1 + 2.0**-20) if len(x) > 8 else result
