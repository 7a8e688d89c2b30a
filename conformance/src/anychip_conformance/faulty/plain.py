"""The honest parts that faults replace one step of: attention in named steps, products and experts that are batch
invariant where asked, and the host's collectives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference import DenseCacheAttention, DenseWeights, ExpertWeights, ReferenceLinear, ReferenceMoE
from anychip.plugin_api import AttentionLayer, BatchView, Communicator, GroupSpec, PartialAttention, Routing
from anychip.types import cdiv
from anychip_conformance.fakes.recorded_communicator import host_communicator


class PlainAttention(DenseCacheAttention):
    """One row at a time, each step a method of its own."""

    name = "plain"

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer) -> Tensor:
        tokens = self.written(plan)
        slots = plan.slot_mapping[tokens].long()
        block, offset = slots // plan.block_size, slots % plan.block_size
        cache[block, 0, offset] = self.encode(k[tokens], self.k_scale(layer))
        cache[block, 1, offset] = self.encode(v[tokens], self.v_scale(layer))
        return cache

    def written(self, plan: BatchView) -> Tensor:
        return (plan.slot_mapping >= 0).nonzero().squeeze(-1)

    def k_scale(self, layer: AttentionLayer) -> Tensor | None:
        return layer.k_scale

    def v_scale(self, layer: AttentionLayer) -> Tensor | None:
        return layer.v_scale

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        result = self.blank(q, out)
        for row, length in enumerate(plan.seq_lens.tolist()):
            begin, end = self.query_range(plan, row)
            if end > begin:
                k, v = self.keys_and_values(cache, plan, row, length, layer)
                result[begin:end] = self.attend_row(self.queries(q, begin, end), k, v, layer, length)
        return result

    def blank(self, q: Tensor, out: Tensor | None) -> Tensor:
        return torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out.zero_()

    def query_range(self, plan: BatchView, row: int) -> tuple[int, int]:
        return int(plan.query_start[row]), int(plan.query_start[row + 1])

    def queries(self, q: Tensor, begin: int, end: int) -> Tensor:
        return q[begin:end]

    def block_ids(self, plan: BatchView, row: int, length: int) -> Tensor:
        return plan.block_table[row, : cdiv(length, plan.block_size)].long()

    def keys_and_values(
        self, cache: Tensor, plan: BatchView, row: int, length: int, layer: AttentionLayer
    ) -> tuple[Tensor, Tensor]:
        """[length, num_kv_heads, head_dim] each."""
        pages = cache[self.block_ids(plan, row, length)]
        k = self.decode(pages[:, 0].flatten(0, 1)[:length], self.k_scale(layer))
        v = self.decode(pages[:, 1].flatten(0, 1)[:length], self.v_scale(layer))
        return k, v

    def attend_with_lse(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> PartialAttention:
        result = self.attend(q, cache, plan, layer, out=out)
        lse = self.blank_lse(q)
        for row, length in enumerate(plan.seq_lens.tolist()):
            begin, end = self.query_range(plan, row)
            if end > begin:
                k, _ = self.keys_and_values(cache, plan, row, length, layer)
                scores, _ = self.masked_scores(self.queries(q, begin, end), k, layer, length)
                lse[begin:end] = self.log_sums(scores, layer)
        return PartialAttention(result, lse)

    def blank_lse(self, q: Tensor) -> Tensor:
        return torch.full(q.shape[:2], -torch.inf)

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        """[queries, num_heads] of masked scores."""
        lse = scores.logsumexp(dim=-1).T
        return lse if layer.sinks is None else torch.logaddexp(lse, self.sinks(layer))

    def masked_scores(self, q: Tensor, k: Tensor, layer: AttentionLayer, length: int) -> tuple[Tensor, Tensor]:
        """[num_heads, queries, keys] with -inf for keys that are not seen, and which are, [queries, keys]."""
        key = torch.arange(len(k))
        query = torch.arange(length - len(q), length).unsqueeze(-1)
        visible = self.visible(query, key)
        scores = self.scores(q.float(), self.by_query_head(k).float(), layer)
        if layer.alibi_slopes is not None:
            scores = scores + self.slopes(layer).view(-1, 1, 1) * (key - query)
        return scores.masked_fill(~visible, -torch.inf), visible

    def attend_row(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, length: int) -> Tensor:
        scores, visible = self.masked_scores(q, k, layer, length)
        weights = self.weights(scores, layer)
        if self.spec.window is not None:
            v = v.masked_fill(~visible.any(dim=0)[:, None, None], 0)
        return self.combine(weights, self.by_query_head(v)).to(q.dtype)

    def by_query_head(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.spec.num_heads // self.spec.num_kv_heads, dim=1)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """[queries, keys], of positions [queries, 1] and [keys]."""
        seen = key <= query
        return seen if self.spec.window is None else seen & (key > query - self.spec.window)

    def scores(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
        return scores if self.spec.softcap is None else self.spec.softcap * torch.tanh(scores / self.spec.softcap)

    def slopes(self, layer: AttentionLayer) -> Tensor:
        assert layer.alibi_slopes is not None
        return layer.alibi_slopes

    def weights(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        if layer.sinks is None:
            return scores.softmax(dim=-1)
        sinks = self.sinks(layer).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]

    def sinks(self, layer: AttentionLayer) -> Tensor:
        assert layer.sinks is not None
        return layer.sinks

    def combine(self, weights: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("hqk,khd->qhd", weights, v.float())


class PlainLinear(ReferenceLinear):
    """A row at a time where batch invariance is asked for."""

    name = "plain"

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        if not self.spec.invariant or len(x) == 0:
            return super().apply(x, packed, out=out)
        result = torch.cat([F.linear(row, packed.weight, packed.bias) for row in x.split(1)])
        return result if out is None else out.copy_(result)


class InvariantMoE(ReferenceMoE):
    """A token at a time where batch invariance is asked for."""

    name = "plain"

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        if not self.spec.invariant:
            return super().experts(x, routing, packed, expert_map=expert_map)
        rows = [
            super(InvariantMoE, self).experts(
                x[i : i + 1],
                Routing(routing.weights[i : i + 1], routing.expert_ids[i : i + 1]),
                packed,
                expert_map=expert_map,
            )
            for i in range(len(x))
        ]
        return torch.cat(rows) if rows else x.clone()


def plain_communicator(group: GroupSpec, fault: Callable[[Communicator], Communicator] | None) -> Communicator:
    """The host's own, wrapped by a fault."""
    inner = host_communicator(group)
    return inner if fault is None or group.size == 1 else fault(inner)
