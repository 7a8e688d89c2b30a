"""Faults of attention's log-sum-exp: its base, what is summed, where it stands, and what rows without keys have."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from anychip.plugin_api import AttentionLayer, BatchView, PartialAttention
from anychip_conformance.faulty.plain import PlainAttention
from anychip_conformance.faulty.registry import fault, placebo


@fault("lse-log2", "attention", killed_by="attn.lse.001")
class BinaryLogarithm(PlainAttention):
    """The logarithm is that to base 2."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return super().log_sums(scores, layer) / math.log(2.0)


@fault("lse-sum-alone", "attention", killed_by="attn.lse.001")
class SumAlone(PlainAttention):
    """The greatest score is subtracted and not added again."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return super().log_sums(scores, layer) - scores.amax(dim=-1).T


@fault("lse-of-another-head", "attention", killed_by="attn.lse.001")
class OfAnotherHead(PlainAttention):
    """Each head has its neighbour's."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return super().log_sums(scores, layer).roll(1, dims=1)


@fault("lse-by-kv-head", "attention", killed_by="attn.lse.004")
class ByKvHead(PlainAttention):
    """The query heads that share a KV head all have its first one's."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        group = self.spec.num_heads // self.spec.num_kv_heads
        return super().log_sums(scores, layer)[:, ::group].repeat_interleave(group, dim=1)


class _SummedApart(PlainAttention):
    """Weighs honestly, and sums something else."""

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        return PlainAttention(self.spec).attend(q, cache, plan, layer, out=out)


@fault("lse-of-another-row", "attention", killed_by="attn.lse.001")
class OfAnotherRow(PlainAttention):
    """Each query has that of the one before."""

    def attend_with_lse(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> PartialAttention:
        honest = super().attend_with_lse(q, cache, plan, layer, out=out)
        return PartialAttention(honest.out, honest.lse.roll(1, dims=0))


@fault("lse-without-scale", "attention", killed_by="attn.lse.001")
class WithoutScale(_SummedApart):
    """Unscaled scores are summed."""

    def scores(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> Tensor:
        return super().scores(q, k, layer) / layer.scale


@fault("lse-without-softcap", "attention", killed_by="attn.lse.007")
class WithoutSoftcap(_SummedApart):
    """Uncapped scores are summed."""

    def scores(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> Tensor:
        return torch.einsum("qhd,khd->hqk", q, k) * layer.scale


@fault("lse-without-alibi", "attention", killed_by="attn.lse.010")
class WithoutAlibi(_SummedApart):
    """Scores are summed without their bias."""

    def slopes(self, layer: AttentionLayer) -> Tensor:
        return torch.zeros_like(super().slopes(layer))


@fault("lse-without-window", "attention", killed_by="attn.lse.016")
class WithoutWindow(PlainAttention):
    """The sum includes keys that the window has left behind."""

    def masked_scores(self, q: Tensor, k: Tensor, layer: AttentionLayer, length: int) -> tuple[Tensor, Tensor]:
        self._all = super().scores(q.float(), self.by_query_head(k).float(), layer)
        return super().masked_scores(q, k, layer, length)

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        queries, keys = scores.shape[1:]
        future = torch.arange(keys) > torch.arange(keys - queries, keys).unsqueeze(-1)
        return super().log_sums(self._all.masked_fill(future, -torch.inf).nan_to_num(0.0, neginf=-torch.inf), layer)


@fault("lse-without-sink", "attention", killed_by="attn.lse.022")
class WithoutSink(PlainAttention):
    """The sum has no sink."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return scores.logsumexp(dim=-1).T


@fault("lse-maximum-not-subtracted", "attention", killed_by="attn.lse.028")
class MaximumNotSubtracted(PlainAttention):
    """Exponentials of whole scores are summed."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return scores.exp().sum(dim=-1).log().T


@fault("lse-in-dtype", "attention", killed_by="attn.lse.002")
class InDtype(PlainAttention):
    """It is rounded to the dtype of the queries."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return super().log_sums(scores, layer).to(getattr(torch, self.spec.dtype)).float()


@fault("lse-padded-rows-zero", "attention", killed_by="attn.lse.001")
class PaddedRowsZero(PlainAttention):
    """Padded rows have 0."""

    def blank_lse(self, q: Tensor) -> Tensor:
        return torch.zeros(q.shape[:2])


@fault("lse-no-keys-nan", "attention", killed_by="attn.lse_merge.001")
class NoKeysNan(PlainAttention):
    """The greatest of no scores is -inf, and -inf less -inf is no number."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return super().log_sums(scores, layer) if scores.shape[-1] else torch.full(scores.shape[1::-1], torch.nan)


@fault("lse-no-keys-without-sink", "attention", killed_by="attn.lse_merge.010")
class NoKeysWithoutSink(PlainAttention):
    """A row without keys is left out, its sinks too."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return super().log_sums(scores, layer) if scores.shape[-1] else torch.full(scores.shape[1::-1], -torch.inf)


@fault("lse-part-by-positions", "attention", killed_by="attn.lse_merge.001")
class PartByPositions(PlainAttention):
    """How many keys a query sees is read from its position, as if the part began where the sequence does."""

    def attend_with_lse(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> PartialAttention:
        last = plan.positions[(plan.query_start[1:].long() - 1).clamp(min=0)]
        most = plan.block_table.shape[1] * plan.block_size
        whole = replace(plan, seq_lens=(last + 1).clamp(max=most))
        return super().attend_with_lse(q, cache, whole, layer, out=out)


@placebo("placebo-lse-by-maximum-and-sum", "attention")
class ByMaximumAndSum(PlainAttention):
    """The greatest score plus the logarithm of the sum relative to it."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        if scores.shape[-1] == 0:
            return super().log_sums(scores, layer)
        most = scores.amax(dim=-1)
        if layer.sinks is not None:
            most = torch.maximum(most, self.sinks(layer).unsqueeze(-1))
        total = (scores - most.unsqueeze(-1)).exp().sum(dim=-1)
        if layer.sinks is not None:
            total = total + (self.sinks(layer).unsqueeze(-1) - most).exp()
        return (most + total.log()).T
