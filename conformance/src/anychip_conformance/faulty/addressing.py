"""Faults of where attention reads and writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import AttentionLayer, BatchView, QKNorm, Rope
from anychip_conformance.faulty.plain import PlainAttention
from anychip_conformance.faulty.registry import fault

# -- where things are read --------------------------------------------------------------------------------------


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


# -- where things are written -----------------------------------------------------------------------------------


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
