"""Faults that time brings out in kernels: the first result is right when it is read at once. later_ops has those of
ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import (
    DenseWeights,
    ExpertWeights,
    ReferenceEncoder,
    ReferenceLatent,
)
from anychip.plugin_api import (
    AttentionLayer,
    BatchView,
    EncoderLayer,
    EncoderView,
    LatentLayer,
    Routing,
    StateLayer,
    StateView,
)
from anychip_conformance.faulty.plain import InvariantMoE, PlainAttention, PlainLinear
from anychip_conformance.faulty.recurrences import PlainRecurrence
from anychip_conformance.faulty.registry import fault
from anychip_conformance.faulty.states import PlainStates, States

EVERY = 64
"""After so many calls of one object something wraps."""


class Scratch:
    """One buffer for each size of a result, which the next call of that size overwrites."""

    def __init__(self) -> None:
        self._buffers: dict[object, Tensor] = {}

    def __call__(self, result: Tensor) -> Tensor:
        held = self._buffers.setdefault((tuple(result.shape), result.dtype), torch.empty_like(result))
        return held.copy_(result)


class Calls:
    """Counts, and is due at every 64th."""

    def __init__(self) -> None:
        self.number = 0

    def due(self) -> bool:
        self.number += 1
        return self.number % EVERY == 0


@fault("linear-one-output-buffer", "linear", killed_by="linear.kept_results.001")
class LinearOneBuffer(PlainLinear):
    """A kernel writes every product of one size to the same storage."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        result = super().apply(x, packed, out=out)
        return self._scratch(result) if out is None else result

    def begin(self) -> DenseWeights:
        self._scratch = Scratch()
        return super().begin()


@fault("linear-every-64th-without-bias", "linear", killed_by="linear.many_calls.002")
class LinearEvery64th(PlainLinear):
    """One product in 64 lacks its bias."""

    def begin(self) -> DenseWeights:
        self._calls = Calls()
        return super().begin()

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        result = super().apply(x, packed, out=out)
        return result - packed.bias if packed.bias is not None and self._calls.due() else result


@fault("linear-as-many-rows-as-before", "linear", killed_by="linear.turns.001")
class AsManyRowsAsBefore(PlainLinear):
    """Rows are copied to a staging area as large as the largest step; a smaller one reads it from the end."""

    _staged: Tensor | None = None

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        if self._staged is None or len(self._staged) < len(x):
            self._staged = x.new_zeros(x.shape)
        self._staged[: len(x)] = x
        return super().apply(self._staged[len(self._staged) - len(x) :], packed, out=out)


@fault("moe-one-output-buffer", "moe", killed_by="moe.kept_results.001")
class MoEOneBuffer(InvariantMoE):
    """What experts give lies where the next layer's will."""

    def begin(self) -> ExpertWeights:
        self._scratch = Scratch()
        return super().begin()

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        return self._scratch(super().experts(x, routing, packed, expert_map=expert_map))


@fault("moe-routes-in-one-buffer", "moe", killed_by="moe.kept_results.001")
class RoutesInOneBuffer(InvariantMoE):
    """Weights and ids of a routing lie where the next one's will."""

    _ids = Scratch()

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        return Routing(self._ids(honest.weights), self._ids(honest.expert_ids))


@fault("moe-sorted-for-the-larger-step", "moe", killed_by="moe.turns.001")
class SortedForTheLarger(InvariantMoE):
    """What a larger step picked is kept, and serves a smaller one's first tokens."""

    _ids: Tensor | None = None

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        if self._ids is None or len(self._ids) < len(x):
            self._ids = routing.expert_ids.clone()
        stale = Routing(routing.weights, self._ids[len(self._ids) - len(x) :])
        return super().experts(x, stale, packed, expert_map=expert_map)


@fault("moe-every-64th-unweighted", "moe", killed_by="moe.many_calls.001")
class MoEEvery64th(InvariantMoE):
    """One call in 64 weighs every expert alike."""

    def begin(self) -> ExpertWeights:
        self._calls = Calls()
        return super().begin()

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        alike = torch.full_like(routing.weights, 1 / self.spec.top_k)
        used = Routing(alike, routing.expert_ids) if self._calls.due() else routing
        return super().experts(x, used, packed, expert_map=expert_map)


@fault("attention-one-output-buffer", "attention", killed_by="attn.kept_results.001")
class AttentionOneBuffer(PlainAttention):
    """A backend's outputs of one size share their storage: the next layer overwrites them."""

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        result = super().attend(q, cache, plan, layer, out=out)
        self._scratch = getattr(self, "_scratch", None) or Scratch()
        return self._scratch(result) if out is None else result


@fault("attention-every-64th-reads-block-0", "attention", killed_by="attn.many_calls.001")
class AttentionEvery64th(PlainAttention):
    """One step in 64 reads its first block from the pool's beginning."""

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        self._calls = getattr(self, "_calls", None) or Calls()
        self._due = self._calls.due()
        return super().attend(q, cache, plan, layer, out=out)

    def block_ids(self, plan: BatchView, row: int, length: int) -> Tensor:
        ids = super().block_ids(plan, row, length).clone()
        ids[:1] *= not self._due
        return ids


@fault("attention-plan-of-the-longest", "attention", killed_by="attn.turns.001")
class PlanOfTheLongest(PlainAttention):
    """What a backend prepared for its longest step so far is used for shorter ones: the place of a row's queries."""

    _starts: Tensor | None = None

    def query_range(self, plan: BatchView, row: int) -> tuple[int, int]:
        if self._starts is None or int(self._starts[-1]) < int(plan.query_start[-1]):
            self._starts = plan.query_start.clone()
        begin, end = super().query_range(plan, row)
        if int(self._starts[-1]) == int(plan.query_start[-1]) or row + 1 >= len(self._starts):
            return begin, end
        at = min(int(self._starts[row]), int(plan.query_start[-1]) - (end - begin))
        return at, at + end - begin


@fault("latent-one-output-buffer", "latent", killed_by="latent.kept_results.001")
class LatentOneBuffer(ReferenceLatent):
    """A backend's outputs of one size share their storage."""

    def attend(self, *given: Any, **more: Any) -> Tensor:
        self._scratch = getattr(self, "_scratch", None) or Scratch()
        return self._scratch(super().attend(*given, **more))


@fault("latent-every-64th-unscaled", "latent", killed_by="latent.many_calls.001")
class LatentEvery64th(ReferenceLatent):
    """One call in 64 forgets the window of positions and the rotated scores."""

    def attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        plan: BatchView,
        layer: LatentLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        self._calls = getattr(self, "_calls", None) or Calls()
        turned = q_rope * 0 if self._calls.due() else q_rope
        return super().attend(q_nope, turned, cache, plan, layer, out=out)


@fault("state-one-output-buffer", "state", killed_by="state.kept_results.001")
class StateOneBuffer(PlainStates):
    """A layer's outputs of one size share their storage."""

    def forward(
        self, inputs: Mapping[str, Tensor], cache: States, plan: StateView, layer: StateLayer
    ) -> tuple[Tensor, States]:
        result, cache = super().forward(inputs, cache, plan, layer)
        self._scratch = getattr(self, "_scratch", None) or Scratch()
        return self._scratch(result), cache


@fault("recurrence-every-64th-from-zeros", "recurrence", killed_by="state.many_calls.004")
class RecurrenceEvery64th(PlainRecurrence):
    """One step in 64 takes every sequence for a new one."""

    def fresh(self, plan: StateView) -> Tensor:
        self._calls = getattr(self, "_calls", None) or Calls()
        honest = super().fresh(plan)
        return torch.ones_like(honest) if self._calls.due() else honest


@fault("encoder-one-output-buffer", "encoder", killed_by="encoder.kept_results.001")
class EncoderOneBuffer(ReferenceEncoder):
    """A layer's outputs of one size share their storage."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        self._scratch = getattr(self, "_scratch", None) or Scratch()
        return self._scratch(super().attend(q, k, v, plan, layer))


@fault("encoder-keys-of-the-call-before", "encoder", killed_by="encoder.many_calls.001")
class KeysOfTheCallBefore(ReferenceEncoder):
    """Under one plan, every 64th layer attends over the keys of the layer before it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        self._calls = getattr(self, "_calls", None) or Calls()
        before, self._keys = getattr(self, "_keys", k), k.clone()
        return super().attend(q, before if self._calls.due() else k, v, plan, layer)
