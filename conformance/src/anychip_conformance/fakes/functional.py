"""What the step-seam fakes share: attention over a functional cache with static shapes, dense experts, and the body
of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import (
    DenseCacheAttention,
    ExpertWeights,
    Passed,
    ReferenceMoE,
    arena_views,
    attend_gathered,
    forward_pass,
)
from anychip.plugin_api import (
    AdapterStack,
    AttentionLayer,
    BatchView,
    CacheBackend,
    HostOutputs,
    KVPlan,
    Ops,
    PartialAttention,
    ReadyOutputs,
    Recorder,
    Routing,
    Scores,
    Section,
    ShapeKey,
    StepModel,
)
from anychip.plugin_api.plan import Plan
from anychip_conformance.fakes.functional_states import functional_state_plan


@dataclass(slots=True)
class FunctionalPlan:
    positions: Tensor  # [num_tokens]
    last_keys: Tensor  # [num_tokens], the last key that each token sees, counted from its row's first
    slot_mapping: Tensor  # [num_tokens]
    tables: Tensor  # [num_tokens, pages], each token's row of the block table
    valid: Tensor  # [num_tokens], whether a token is a row's


def functional_plan(positions: Tensor, slots: Tensor, starts: Tensor, lengths: Tensor, table: Tensor) -> FunctionalPlan:
    """Without a look at the host: starts [num_reqs + 1], lengths [num_reqs], table [num_reqs, pages]."""
    tokens = torch.arange(positions.shape[0], device=positions.device)
    row = torch.searchsorted(starts[1:].contiguous(), tokens.int(), right=True).clamp(max=starts.shape[0] - 2)
    last_keys = lengths[row] - starts[row + 1] + tokens
    return FunctionalPlan(positions, last_keys, slots.long(), table[row].long(), tokens < starts[-1])


class FunctionalAttention(DenseCacheAttention):
    """Writes by making a new cache, attends without a look at the host. Every shape follows from the inputs'."""

    name = "functional"
    block_sizes = (16, 32)

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: Plan | None = None,
        recorder: Recorder | None = None,
    ) -> FunctionalPlan:
        return functional_plan(
            batch.positions, batch.slot_mapping, batch.query_start, batch.seq_lens, batch.block_table
        )

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: FunctionalPlan, layer: AttentionLayer) -> Tensor:
        size = cache.shape[2]
        # Padding goes to one row past the end, which is cut off again.
        flat = cache.transpose(1, 2).flatten(0, 1)  # [blocks * size, 2, kv_heads, dim]
        extended = torch.cat((flat, flat[:1]))
        target = torch.where(plan.slot_mapping >= 0, plan.slot_mapping, flat.shape[0])
        written = extended.index_copy(0, target, torch.stack((k, v), dim=1))[:-1]
        return written.unflatten(0, (-1, size)).transpose(1, 2)

    def attend(
        self,
        q: Tensor,
        cache: Tensor,
        plan: FunctionalPlan,
        layer: AttentionLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        return self._attended(q, cache, plan, layer)[0]

    def attend_with_lse(
        self,
        q: Tensor,
        cache: Tensor,
        plan: FunctionalPlan,
        layer: AttentionLayer,
        *,
        out: Tensor | None = None,
    ) -> PartialAttention:
        out, log_sum = self._attended(q, cache, plan, layer)
        return PartialAttention(out, log_sum())

    def _attended(
        self, q: Tensor, cache: Tensor, plan: FunctionalPlan, layer: AttentionLayer
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        k, v = (cache[plan.tables][:, :, part].flatten(1, 2) for part in (0, 1))
        return attend_gathered(q, k, v, plan.last_keys, plan.valid, self.spec, layer)


class DenseMoE(ReferenceMoE):
    """Every expert on every token, weighted by zero where it was not picked: no shape depends on the routing."""

    name = "dense"

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        outputs = torch.stack([self.expert(x, packed, e) for e in range(len(packed.gate_up))], dim=1).float()
        ids = routing.expert_ids if expert_map is None else expert_map[routing.expert_ids]
        weights = routing.weights.masked_fill(ids < 0, 0)
        share = torch.zeros(outputs.shape[:2]).scatter_add(1, ids.clamp(min=0), weights)
        return (outputs * share.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def tensors(arena: np.ndarray, sections: Mapping[str, Section]) -> dict[str, Tensor]:
    """An arena's arrays, copied to the device's memory."""
    return arena_views(torch.from_numpy(arena.copy()), sections)


def edited(backend: CacheBackend, cache: Tensor, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> Tensor:
    """A new cache with blocks copied, in order, and then blocks zeroed."""
    cache = cache.clone()
    for source, destination in copies:
        cache = backend.copy_blocks(cache, [source], [destination])
    return backend.zero_blocks(cache, zeros) if zeros else cache


def forward_body(
    model: StepModel,
    ops: Ops,
    kv: KVPlan,
    caches: Sequence[Tensor],
    last_ids: Tensor,
    fields: Mapping[str, Tensor],
    *,
    tap_layers: Sequence[int] = (),
    embeddings: Tensor | None = None,
    stacks: Sequence[AdapterStack] = (),
) -> Passed:
    """One forward pass over functional caches. `embeddings`: the buffer of embeddings, `stacks`: the adapters by site,
    where the program has them."""
    plans: list[Any] = [
        functional_plan(
            fields["positions"],
            fields[f"slot_mapping_{group}"],
            fields["query_start"],
            fields["seq_lens"],
            fields[f"block_table_{group}"],
        )
        for group in range(len(kv.block_sizes))
    ]
    if kv.states:
        rows = fields["query_start"], fields["seq_lens"], fields["state_blocks"]
        plans += [functional_state_plan(*rows, len(fields["input_ids"]))] * len(kv.states)
    return forward_pass(
        model, ops, plans, kv.layer_groups, caches, last_ids, fields,
        tap_layers=tap_layers, embeddings=embeddings, stacks=stacks,
    )  # fmt: skip


def chosen_scores(values: Sequence[Tensor], targets: np.ndarray | None) -> Scores | None:
    """Of every token's scores, those of the tokens that had a target."""
    if targets is None:
        return None
    logprobs, top_ids, top = (value.numpy()[targets >= 0] for value in values)
    return Scores(logprobs=logprobs, top_ids=top_ids, top_logprobs=top)


def outputs(
    drawn: Mapping[str, Tensor], num_samples: int, scores: Scores | None = None, pooled: Tensor | None = None
) -> ReadyOutputs:
    """Of the samples that are no padding."""
    host = {name: value[:num_samples].numpy() for name, value in drawn.items()}
    return ReadyOutputs(HostOutputs(**host, scores=scores, pooled=None if pooled is None else pooled.numpy()))
