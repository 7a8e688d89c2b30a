"""Faults of attention: masks, heads, scores, sums, and where things are read and written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import AttentionLayer, BatchView, QKNorm, Rope
from anychip_conformance.faulty.plain import PlainAttention
from anychip_conformance.faulty.registry import fault, placebo

# -- masks ----------------------------------------------------------------------------------------------------


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


# -- heads and scores -----------------------------------------------------------------------------------------


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


# -- sums -----------------------------------------------------------------------------------------------------


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


# -- where things are read ------------------------------------------------------------------------------------


@fault("attn-partial-block-dropped", "attention", killed_by="attn.decode.001")
class PartialBlockDropped(PlainAttention):
    """The last block counts only when it is full."""

    def keys_and_values(self, cache: Tensor, plan: BatchView, row: int, length: int, layer: AttentionLayer) -> Any:
        whole = length // plan.block_size * plan.block_size
        return super().keys_and_values(cache, plan, row, whole or length, layer)


@fault("attn-neighbours-table", "attention", killed_by="attn.mixed.001")
class NeighboursTable(PlainAttention):
    """Every row but the first reads the block table of the row before."""

    def block_ids(self, plan: BatchView, row: int, length: int) -> Tensor:
        return super().block_ids(plan, max(0, row - 1), length)


@fault("attn-block-size-16", "attention", killed_by="attn.block_size.003")
class BlockSize16(PlainAttention):
    """Sixteen tokens a block, whatever the layout says."""

    def keys_and_values(self, cache: Tensor, plan: BatchView, row: int, length: int, layer: AttentionLayer) -> Any:
        place = torch.arange(length)
        block = plan.block_table[row].long()[(place // 16).clamp(max=plan.block_table.shape[1] - 1)]
        return cache[block, 0, place % 16], cache[block, 1, place % 16]


@fault("attn-strides-ignored", "attention", killed_by="attn.strides.001")
class StridesIgnored(PlainAttention):
    """q is read as if it were contiguous."""

    def queries(self, q: Tensor, begin: int, end: int) -> Tensor:
        heads, dim = q.shape[1:]
        return torch.as_strided(q, q.shape, (heads * dim, dim, 1))[begin:end]


@fault("attn-q-scaled-in-place", "attention", killed_by="attn.prefill.001")
class QScaledInPlace(PlainAttention):
    """The caller's queries are scaled where they lie."""

    def attend_row(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, length: int) -> Tensor:
        result = super().attend_row(q, k, v, layer, length)
        q.mul_(layer.scale)
        return result


@fault("attn-stale-values-leak", "attention", killed_by="attn.decode.001")
class StaleValuesLeak(PlainAttention):
    """The rest of the last block is multiplied by zero instead of being left out."""

    def keys_and_values(self, cache: Tensor, plan: BatchView, row: int, length: int, layer: AttentionLayer) -> Any:
        whole = -(-length // plan.block_size) * plan.block_size
        return super().keys_and_values(cache, plan, row, whole, layer)


@fault("attn-window-poison-leaks", "attention", killed_by="attn.window.007")
class WindowPoisonLeaks(PlainAttention):
    """Values of blocks that the window has passed are multiplied by zero."""

    def attend_row(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, length: int) -> Tensor:
        key = torch.arange(len(k))
        query = torch.arange(length - len(q), length).unsqueeze(-1)
        scores = self.scores(q.float(), self.by_query_head(k).float(), layer)
        weights = self.weights(scores.masked_fill(~self.visible(query, key), -torch.inf), layer)
        return self.combine(weights, self.by_query_head(v)).to(q.dtype)


@fault("attn-far-offset-32-bits", "attention", killed_by="attn.far_blocks.001")
class FarOffset32Bits(PlainAttention):
    """The offset of a block is kept in 32 bits."""

    def block_ids(self, plan: BatchView, row: int, length: int) -> Tensor:
        page = self.kv_layout().page_bytes(plan.block_size)
        return (super().block_ids(plan, row, length) * page & 0xFFFFFFFF) // page


@fault("attn-empty-rows-counted", "attention", killed_by="attn.padding.004")
class EmptyRowsCounted(PlainAttention):
    """Rows without queries are taken to have one."""

    def query_range(self, plan: BatchView, row: int) -> tuple[int, int]:
        starts = plan.query_start.tolist()
        lengths = [max(1, starts[i + 1] - starts[i]) for i in range(row + 1)]
        begin = min(sum(lengths[:row]), plan.num_tokens)
        return begin, min(begin + lengths[row], plan.num_tokens) if plan.seq_lens[row] else begin


# -- where things are written ---------------------------------------------------------------------------------


@fault("attn-padded-rows-unwritten", "attention", killed_by="attn.padding.001")
class PaddedRowsUnwritten(PlainAttention):
    """Padded rows keep what their storage held."""

    def blank(self, q: Tensor, out: Tensor | None) -> Tensor:
        return torch.full_like(q, 7.0) if out is None else out


@fault("attn-written-past-the-end", "attention", killed_by="attn.padding.002")
class WrittenPastTheEnd(PlainAttention):
    """A tile's last row lies behind the output."""

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        result = super().attend(q, cache, plan, layer, out=out)
        if out is not None:
            tokens, heads, dim = out.shape
            torch.as_strided(out, (tokens + 1, heads, dim), out.stride())[-1] = 0.0
        return result


@fault("attn-read-only-writes", "attention", killed_by="attn.read_only.001")
class ReadOnlyWrites(PlainAttention):
    """A layer that reads another's cache writes its queries there."""

    def forward(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: Any, plan: Any, layer: AttentionLayer,
                **rest: Any) -> Any:  # fmt: skip
        if k is None:
            cache[int(plan.block_table[0, 0]), 0, 0] = q[0, : self.spec.num_kv_heads]
        return super().forward(q, k, v, cache, plan, layer, **rest)


@fault("attn-keys-not-rotated", "attention", killed_by="attn.rotary.001")
class KeysNotRotated(PlainAttention):
    """Rotary reaches queries only."""

    def forward(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: Any, plan: Any, layer: AttentionLayer, *,
                rope: Rope | None = None, qk_norm: QKNorm | None = None, out: Tensor | None = None) -> Any:  # fmt: skip
        turned, _ = layer.ops.qkv_norm_rope(q=q, k=None, positions=plan.positions, rope=rope, qk_norm=qk_norm)
        return super().forward(turned, k, v, cache, plan, layer, out=out)


@fault("attn-rotary-by-place-in-batch", "attention", killed_by="attn.rotary.001")
class RotaryByPlaceInBatch(PlainAttention):
    """A token turns by its place in the batch instead of in its text."""

    def positions(self, plan: Any) -> Tensor:
        return torch.arange(len(plan.positions), dtype=torch.int32)


@fault("attn-unpadded-only", "attention", killed_by="attn.padding.001")
class UnpaddedOnly(PlainAttention):
    """The result has no padded rows."""

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        return super().attend(q, cache, plan, layer, out=out)[: int(plan.query_start[-1])]


@fault("attn-varies-with-the-batch", "attention", killed_by="attn.batch_invariant.001")
class VariesWithTheBatch(PlainAttention):
    """How sums are split depends on how many rows there are, while batch invariance is declared."""

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        self._split = plan.num_reqs
        return super().attend(q, cache, plan, layer, out=out)

    def combine(self, weights: Tensor, v: Tensor) -> Tensor:
        parts = [super(VariesWithTheBatch, self).combine(w, x) for w, x in zip(
            weights.tensor_split(self._split, dim=-1), v.tensor_split(self._split), strict=True)]  # fmt: skip
        return torch.stack(parts).sum(dim=0)


@fault("attn-drifts-between-runs", "attention", killed_by="attn.repeat.001")
class DriftsBetweenRuns(PlainAttention):
    """Each call adds a little less than a unit in the last place, as atomics in no order do."""

    calls = 0

    def combine(self, weights: Tensor, v: Tensor) -> Tensor:
        DriftsBetweenRuns.calls += 1
        return super().combine(weights, v) * (1 + 2.0**-23 * (DriftsBetweenRuns.calls % 7))


# -- harmless -------------------------------------------------------------------------------------------------


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
        pages = [cache[int(block)] for block in self.block_ids(plan, row, length)]
        k = self.decode(torch.cat([page[0] for page in pages])[:length], self.k_scale(layer))
        v = self.decode(torch.cat([page[1] for page in pages])[:length], self.v_scale(layer))
        return k, v
