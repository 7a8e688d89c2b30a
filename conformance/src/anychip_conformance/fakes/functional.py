"""What the step-seam fakes share: attention over a functional cache with static shapes, dense experts, and the body
of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import (
    DenseCacheAttention,
    ExpertWeights,
    ReferenceMoE,
    arena_views,
    softmax_with_sinks,
)
from anychip.plugin_api import (
    MAX_LOGPROBS,
    AttentionBackend,
    AttentionLayer,
    BatchView,
    ForwardContext,
    HostOutputs,
    KVPlan,
    Ops,
    QKNorm,
    ReadyOutputs,
    Recorder,
    Rope,
    Routing,
    Scores,
    Section,
    ShapeKey,
    StepModel,
)
from anychip.plugin_api.plan import Plan


@dataclass(slots=True)
class FunctionalPlan:
    positions: Tensor  # [num_tokens]
    slot_mapping: Tensor  # [num_tokens]
    tables: Tensor  # [num_tokens, pages], each token's row of the block table
    valid: Tensor  # [num_tokens], whether a token is a row's


def functional_plan(positions: Tensor, slots: Tensor, starts: Tensor, table: Tensor) -> FunctionalPlan:
    """Without a look at the host: starts [num_reqs + 1], table [num_reqs, pages]."""
    tokens = torch.arange(positions.shape[0], device=positions.device)
    row = torch.searchsorted(starts[1:].contiguous(), tokens.int(), right=True).clamp(max=starts.shape[0] - 2)
    return FunctionalPlan(positions, slots.long(), table[row].long(), tokens < starts[-1])


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
        return functional_plan(batch.positions, batch.slot_mapping, batch.query_start, batch.block_table)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Tensor,
        plan: FunctionalPlan,
        layer: AttentionLayer,
        *,
        rope: Rope | None = None,
        qk_norm: QKNorm | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        q, k = layer.ops.qkv_norm_rope(q=q, k=k, positions=plan.positions, rope=rope, qk_norm=qk_norm)
        if k is not None and v is not None:
            cache = self._written(cache, k, v, plan.slot_mapping)
        return self._attended(q, cache, plan, layer), cache

    def _written(self, cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        size = cache.shape[2]
        # Padding goes to one row past the end, which is cut off again.
        flat = cache.transpose(1, 2).flatten(0, 1)  # [blocks * size, 2, kv_heads, dim]
        extended = torch.cat((flat, flat[:1]))
        target = torch.where(slots >= 0, slots, flat.shape[0])
        written = extended.index_copy(0, target, torch.stack((k, v), dim=1))[:-1]
        return written.unflatten(0, (-1, size)).transpose(1, 2)

    def _attended(self, q: Tensor, cache: Tensor, plan: FunctionalPlan, layer: AttentionLayer) -> Tensor:
        size, spec = cache.shape[2], self.spec
        pages = cache[plan.tables]  # [num_tokens, pages, 2, size, kv_heads, dim]
        k, v = pages[:, :, 0].flatten(1, 2), pages[:, :, 1].flatten(1, 2)  # [num_tokens, keys, kv_heads, dim]
        keys = torch.arange(plan.tables.shape[1] * size, device=q.device)
        visible = keys <= plan.positions.unsqueeze(-1)  # [num_tokens, keys]
        if spec.window is not None:
            visible = visible & (keys > plan.positions.unsqueeze(-1) - spec.window)
        visible = visible & plan.valid.unsqueeze(-1)
        grouped = q.unflatten(1, (spec.num_kv_heads, -1)).float()  # [num_tokens, kv_heads, share, dim]
        scores = torch.einsum("tgsd,tkgd->tgsk", grouped, k.float()) * layer.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if layer.alibi_slopes is not None:
            distance = (keys - plan.positions.unsqueeze(-1))[:, None, None]
            scores = scores + layer.alibi_slopes.view(1, spec.num_kv_heads, -1, 1) * distance
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        sinks = None if layer.sinks is None else layer.sinks.view(1, spec.num_kv_heads, -1, 1)
        weights = softmax_with_sinks(scores, sinks).masked_fill(~visible[:, None, None], 0)
        v = v.float().masked_fill(~visible[:, :, None, None], 0)
        return torch.einsum("tgsk,tkgd->tgsd", weights, v).flatten(1, 2).to(q.dtype)


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


def edited(backend: AttentionBackend, cache: Tensor, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> Tensor:
    """A new cache with blocks copied, in order, and then blocks zeroed."""
    cache = cache.clone()
    for source, destination in copies:
        cache = backend.copy_blocks(cache, [source], [destination])
    return backend.zero_blocks(cache, zeros) if zeros else cache


def forward_body(
    model: StepModel, ops: Ops, kv: KVPlan, caches: Sequence[Tensor], last_ids: Tensor, fields: Mapping[str, Tensor]
) -> tuple[list[Tensor], Tensor, *tuple[Tensor, ...]]:
    """One forward pass: the new caches by layer, logits for every row, padded ones included, and where targets are
    given the scores of every token, of which those with a target count."""
    ids = fields["input_ids"]
    ids = torch.where(ids < 0, last_ids[fields["token_slots"]], ids)
    plans = [
        functional_plan(
            fields["positions"],
            fields[f"slot_mapping_{group}"],
            fields["query_start"],
            fields[f"block_table_{group}"],
        )
        for group in range(len(kv.block_sizes))
    ]
    context = ForwardContext(plans, list(caches), kv.layer_groups)
    hidden = model.forward(ids, fields["positions"], context)
    logits = model.logits(hidden[fields["logits_indices"]])
    if "score_targets" not in fields:
        return context.caches, logits
    targets = fields["score_targets"].clamp(min=0)
    scores = ops.logprobs(logits=model.logits(hidden).float(), token_ids=targets, num_top=MAX_LOGPROBS)
    return context.caches, logits, *scores


def chosen_scores(values: Sequence[Tensor], targets: np.ndarray | None) -> Scores | None:
    """Of every token's scores, those of the tokens that had a target."""
    if targets is None:
        return None
    logprobs, top_ids, top = (value.numpy()[targets >= 0] for value in values)
    return Scores(logprobs=logprobs, top_ids=top_ids, top_logprobs=top)


def outputs(drawn: Mapping[str, Tensor], num_samples: int, scores: Scores | None = None) -> ReadyOutputs:
    """Of the samples that are no padding."""
    host = {name: value[:num_samples].numpy() for name, value in drawn.items()}
    return ReadyOutputs(HostOutputs(**host, scores=scores))
