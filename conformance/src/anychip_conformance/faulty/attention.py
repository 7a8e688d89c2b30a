"""Faults of attention's arithmetic: masks, heads, scores, sums; and changes that are harmless."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import AttentionLayer, BatchView
from anychip_conformance.faulty.plain import PlainAttention
from anychip_conformance.faulty.registry import fault, placebo

# -- masks ------------------------------------------------------------------------------------------------------


@fault("attn-future-key", "attention", killed_by="attn.prefill.001")
class FutureKey(PlainAttention):
    """The causal mask lets one future key in."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return super().visible(query, key) | (key == query + 1)


@fault("attn-mask-top-left", "attention", killed_by="attn.chunk.001")
class TopLeftMask(PlainAttention):
    """A chunk's mask is aligned to the top left corner."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return super().visible(query - query[0], key)


@fault("attn-chunk-misses-itself", "attention", killed_by="attn.chunk.001")
class ChunkMissesItself(PlainAttention):
    """A later chunk sees its context and not itself."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        first = query[0]
        context_only = (key < first) | (first == 0)
        return super().visible(query, key) & context_only


@fault("attn-window-one-more", "attention", killed_by="attn.window.001")
class WindowOneMore(PlainAttention):
    """The window reaches one key too far."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return key <= query if self.spec.window is None else (key <= query) & (key >= query - self.spec.window)


@fault("attn-window-one-less", "attention", killed_by="attn.window.001")
class WindowOneLess(PlainAttention):
    """The window ends one key too early."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        if self.spec.window is None:
            return key <= query
        return (key <= query) & (key > query - max(1, self.spec.window - 1))


@fault("attn-window-ignored-in-decode", "attention", killed_by="attn.window.004")
class WindowIgnoredInDecode(PlainAttention):
    """Rows with one query see everything."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return key <= query if len(query) == 1 else super().visible(query, key)


# -- heads and scores -------------------------------------------------------------------------------------------


@fault("attn-gqa-modulo", "attention", killed_by="attn.gqa.003")
class GqaModulo(PlainAttention):
    """Query head h reads KV head h modulo their number."""

    def by_query_head(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.spec.num_heads // self.spec.num_kv_heads, 1)


@fault("attn-softcap-before-scale", "attention", killed_by="attn.softcap.001")
class SoftcapBeforeScale(PlainAttention):
    """The cap is applied to the unscaled score."""

    def scores(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> Tensor:
        raw = torch.einsum("qhd,khd->hqk", q, k)
        cap = self.spec.softcap
        return raw * layer.scale if cap is None else cap * torch.tanh(raw / cap) * layer.scale


@fault("attn-softcap-ignored", "attention", killed_by="attn.softcap.001")
class SoftcapIgnored(PlainAttention):
    """No cap at all."""

    def scores(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> Tensor:
        return torch.einsum("qhd,khd->hqk", q, k) * layer.scale


@fault("attn-scale-ignored", "attention", killed_by="attn.scale.001")
class ScaleIgnored(PlainAttention):
    """1 / sqrt(head_dim), whatever the caller says."""

    def scores(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> Tensor:
        return super().scores(q, k, layer) / layer.scale * self.spec.head_dim**-0.5


@fault("attn-alibi-by-kv-head", "attention", killed_by="attn.alibi.001")
class AlibiByKvHead(PlainAttention):
    """All query heads of one KV head share its first slope."""

    def slopes(self, layer: AttentionLayer) -> Tensor:
        return super().slopes(layer).view(self.spec.num_kv_heads, -1)[:, :1].expand(-1, self._group).flatten()

    @property
    def _group(self) -> int:
        return self.spec.num_heads // self.spec.num_kv_heads


@fault("attn-sinks-ignored", "attention", killed_by="attn.sinks.001")
class SinksIgnored(PlainAttention):
    """The softmax has no sink."""

    def weights(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return scores.softmax(dim=-1)


@fault("attn-sinks-by-kv-head", "attention", killed_by="attn.sinks.004")
class SinksByKvHead(PlainAttention):
    """All query heads of one KV head share its first sink."""

    def sinks(self, layer: AttentionLayer) -> Tensor:
        group = self.spec.num_heads // self.spec.num_kv_heads
        return super().sinks(layer)[::group].repeat_interleave(group)


# -- sums -------------------------------------------------------------------------------------------------------


@fault("attn-split-not-rescaled", "attention", killed_by="attn.decode.001")
class SplitNotRescaled(PlainAttention):
    """Two halves of the keys, each with a softmax of its own, are averaged."""

    def weights(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        half = scores.shape[-1] // 2
        if half == 0:
            return super().weights(scores, layer)
        parts = [part.softmax(dim=-1).nan_to_num(0.0) for part in scores.split([half, scores.shape[-1] - half], dim=-1)]
        joined = torch.cat(parts, dim=-1)
        return joined / joined.sum(dim=-1, keepdim=True)


@fault("attn-no-running-maximum", "attention", killed_by="attn.large_scores.001")
class NoRunningMaximum(PlainAttention):
    """Exponentials of whole scores."""

    def weights(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        exp = scores.exp()
        return exp / exp.sum(dim=-1, keepdim=True)


@fault("attn-values-summed-in-bf16", "attention", killed_by="attn.long.001")
class ValuesSummedInBf16(PlainAttention):
    """Probabilities times values are accumulated in bfloat16."""

    def combine(self, weights: Tensor, v: Tensor) -> Tensor:
        if v.dtype != torch.bfloat16:
            return super().combine(weights, v)
        total = torch.zeros(weights.shape[1], v.shape[1], v.shape[2], dtype=torch.bfloat16)
        for key in range(len(v)):
            total += weights[:, :, key].T.unsqueeze(-1).bfloat16() * v[key]
        return total


@fault("attn-scores-in-dtype", "attention", killed_by="attn.large_scores.003")
class ScoresInDtype(PlainAttention):
    """Scores are rounded to the dtype of queries and keys before the softmax, large as they are."""

    def scores(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> Tensor:
        return super().scores(q, k, layer).to(getattr(torch, self.spec.dtype)).float()


# -- harmless ---------------------------------------------------------------------------------------------------


@placebo("placebo-split-and-rescaled", "attention")
class SplitAndRescaled(PlainAttention):
    """Two halves of the keys, joined by their maxima and sums as they should be."""

    def weights(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        half = scores.shape[-1] // 2
        if half == 0 or layer.sinks is not None:
            return super().weights(scores, layer)
        parts = scores.split([half, scores.shape[-1] - half], dim=-1)
        top = torch.stack([part.amax(dim=-1) for part in parts]).amax(dim=0).unsqueeze(-1)
        exps = [(part - top).exp() for part in parts]
        total = torch.stack([exp.sum(dim=-1) for exp in exps]).sum(dim=0).unsqueeze(-1)
        return torch.cat(exps, dim=-1) / total


@placebo("placebo-blocks-one-by-one", "attention")
class BlocksOneByOne(PlainAttention):
    """Keys and values are read block by block, in a loop."""

    def keys_and_values(self, cache: Tensor, plan: BatchView, row: int, length: int, layer: AttentionLayer) -> Any:
        if length == 0:  # a part of a sequence, of which it has nothing
            return super().keys_and_values(cache, plan, row, length, layer)
        pages = [cache[int(block)] for block in self.block_ids(plan, row, length)]
        k = self.decode(torch.cat([page[0] for page in pages])[:length], self.k_scale(layer))
        v = self.decode(torch.cat([page[1] for page in pages])[:length], self.v_scale(layer))
        return k, v
