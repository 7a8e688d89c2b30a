"""Faults of attention that is right up to a size, and wrong beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import AttentionLayer, BatchView
from anychip_conformance.faulty.plain import PlainAttention
from anychip_conformance.faulty.registry import fault

_CONTEXT, _BATCH, _HEADS = "attn.reach_context.{:03}", "attn.reach_batch.{:03}", "attn.reach_heads.{:03}"


# -- keys -------------------------------------------------------------------------------------------------------


def unseen_past(size: int, summary: str) -> type[PlainAttention]:
    """Keys from the `size`-th on are not seen, but a row's newest."""

    class Unseen(PlainAttention):
        def visible(self, query: Tensor, key: Tensor) -> Tensor:
            return super().visible(query, key) & ((key < size) | (key == query))

    Unseen.__doc__ = summary
    return Unseen


for _size, _case in ((128, 1), (256, 1), (4096, 1), (8192, 1), (32_768, 1), (65_536, 1), (131_070, 1)):
    fault(f"attn-keys-past-{_size}", "attention", killed_by=_CONTEXT.format(_case))(
        unseen_past(_size, f"Keys past the {_size:,}th are not seen.")
    )


@fault("attn-last-key-of-a-long-context", "attention", killed_by=_CONTEXT.format(2))
class LastKeyOfALongContext(PlainAttention):
    """Where keys are split, at 1,024 and more, the last one before the newest falls between two splits."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        seen = super().visible(query, key)
        return seen if len(key) < 1024 else seen & (key != len(key) - 2)


@fault("attn-one-split-too-few", "attention", killed_by=_CONTEXT.format(1))
class OneSplitTooFew(PlainAttention):
    """Splits of 256 keys are numbered in a byte: those of the 256th and later ones are added where the first were."""

    def keys_and_values(
        self, cache: Tensor, plan: BatchView, row: int, length: int, layer: AttentionLayer
    ) -> tuple[Tensor, Tensor]:
        k, v = super().keys_and_values(cache, plan, row, length, layer)
        wrapped = torch.arange(length) % 65_536
        return k[wrapped], v[wrapped]


@fault("attn-pages-wrap", "attention", killed_by=_CONTEXT.format(7))
class PagesWrap(PlainAttention):
    """A row of the block table has 1,024 entries; later pages are looked up from its beginning."""

    def block_ids(self, plan: BatchView, row: int, length: int) -> Tensor:
        ids = super().block_ids(plan, row, length)
        return ids[torch.arange(len(ids)) % 1024]


@fault("attn-pages-past-4096", "attention", killed_by=_CONTEXT.format(7))
class PagesPast4096(PlainAttention):
    """The table's row ends at 4,096 pages: the last of them stands for all behind it."""

    def block_ids(self, plan: BatchView, row: int, length: int) -> Tensor:
        ids = super().block_ids(plan, row, length)
        return ids[torch.arange(len(ids)).clamp(max=4095)]


@fault("attn-chunk-of-a-long-context", "attention", killed_by=_CONTEXT.format(3))
class ChunkOfALongContext(PlainAttention):
    """Chunks see the last 16,384 keys of their context, single tokens all."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        seen = super().visible(query, key)
        return seen if len(query) == 1 else seen & (key > query - 16_384)


@fault("attn-lse-past-4096", "attention", killed_by=_CONTEXT.format(4))
class LogSumPast4096(PlainAttention):
    """The log-sum-exp is of the first 4,096 keys."""

    def log_sums(self, scores: Tensor, layer: AttentionLayer) -> Tensor:
        return super().log_sums(scores[..., :4096], layer)


@fault("attn-alibi-distance-in-a-byte", "attention", killed_by=_CONTEXT.format(6))
class AlibiDistanceInAByte(PlainAttention):
    """Keys 256 places away and more all count as 255 away."""

    def masked_scores(self, q: Tensor, k: Tensor, layer: AttentionLayer, length: int) -> tuple[Tensor, Tensor]:
        scores, visible = super().masked_scores(q, k, layer, length)
        if layer.alibi_slopes is None:
            return scores, visible
        query = torch.arange(length - len(q), length).unsqueeze(-1)
        beyond = (query - torch.arange(len(k)) - 255).clamp(min=0)
        return scores + self.slopes(layer).view(-1, 1, 1) * beyond, visible


@fault("attn-bytes-past-16384", "attention", killed_by="attn.reach_bytes.001")
class BytesPast16384(PlainAttention):
    """Keys of a one-byte cache past the 16,384th are read as zeros."""

    def keys_and_values(
        self, cache: Tensor, plan: BatchView, row: int, length: int, layer: AttentionLayer
    ) -> tuple[Tensor, Tensor]:
        k, v = super().keys_and_values(cache, plan, row, length, layer)
        if self.quantized and length > 16_384:
            k = k.clone()
            k[16_384:] = 0
        return k, v


# -- windows ----------------------------------------------------------------------------------------------------


def windows_past(size: int, taken_for: int | None, summary: str) -> type[PlainAttention]:
    """Windows wider than `size` are `taken_for` another; None: for none."""

    class Wide(PlainAttention):
        def visible(self, query: Tensor, key: Tensor) -> Tensor:
            window = self.spec.window
            if window is None or window <= size:
                return super().visible(query, key)
            return key <= query if taken_for is None else (key <= query) & (key > query - taken_for)

    Wide.__doc__ = summary
    return Wide


fault("attn-window-at-most-4095", "attention", killed_by="attn.reach_window.001")(
    windows_past(4095, 4095, "No window is wider than 4,095 keys.")
)
fault("attn-window-past-1024-ignored", "attention", killed_by="attn.reach_window.001")(
    windows_past(1024, None, "Windows wider than 1,024 keys let everything be seen.")
)
fault("attn-window-in-a-byte", "attention", killed_by="attn.reach_window.001")(
    windows_past(127, 127, "The width of a window is a signed byte, and kept within it.")
)


# -- rows and tokens --------------------------------------------------------------------------------------------


def zeros_past(what: str, size: int, summary: str) -> type[PlainAttention]:
    """Results of rows, tokens, queries of a row or heads from the `size`-th on are zeros."""

    class Zeros(PlainAttention):
        def attend(
            self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
        ) -> Tensor:
            result = super().attend(q, cache, plan, layer, out=out)
            starts = plan.query_start.tolist()
            if what == "rows" and len(starts) > size:
                result[starts[size] :] = 0
            if what == "tokens":
                result[size:] = 0
            if what == "queries":
                for begin, end in pairwise(starts):
                    result[min(begin + size, end) : end] = 0
            if what == "heads":
                result[:, size:] = 0
            return result

    Zeros.__doc__ = summary
    return Zeros


for _id, _what, _size, _case, _summary in (
    ("attn-rows-past-64", "rows", 64, _BATCH.format(1), "Rows past the 64th of a batch come out as zeros."),
    ("attn-rows-past-512", "rows", 512, _BATCH.format(1), "Rows past the 512th of a batch come out as zeros."),
    ("attn-rows-past-1024", "rows", 1024, _BATCH.format(1), "Rows past the 1,024th of a batch come out as zeros."),
    ("attn-tokens-past-4096", "tokens", 4096, _BATCH.format(3), "Tokens past the 4,096th of a step are zeros."),
    ("attn-tokens-past-8192", "tokens", 8192, _BATCH.format(3), "Tokens past the 8,192nd of a step are zeros."),
    ("attn-queries-past-128", "queries", 128, _BATCH.format(4), "Tokens past the 128th of a chunk are zeros."),
    ("attn-queries-past-2048", "queries", 2048, _BATCH.format(4), "Tokens past the 2,048th of a chunk are zeros."),
    ("attn-heads-past-64", "heads", 64, _HEADS.format(1), "Heads past the 64th come out as zeros."),
    ("attn-heads-past-127", "heads", 127, _HEADS.format(1), "The 128th head comes out as zeros."),
):
    fault(_id, "attention", killed_by=_case)(zeros_past(_what, _size, _summary))


@fault("attn-writes-512-tokens", "attention", killed_by=_BATCH.format(3))
class Writes512Tokens(PlainAttention):
    """Keys and values of tokens past the 512th of a step are not written."""

    def written(self, plan: BatchView) -> Tensor:
        tokens = super().written(plan)
        return tokens[tokens < 512]


# -- heads ------------------------------------------------------------------------------------------------------


@fault("attn-group-past-16", "attention", killed_by=_HEADS.format(3))
class GroupPast16(PlainAttention):
    """A tile holds 16 query heads of a KV head; those behind them read as the first ones."""

    def scores(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> Tensor:
        group = self.spec.num_heads // self.spec.num_kv_heads
        head = torch.arange(self.spec.num_heads)
        return super().scores(q[:, head - head % group + head % group % 16], k, layer)


@fault("attn-head-dim-past-256", "attention", killed_by=_HEADS.format(8))
class HeadDimPast256(PlainAttention):
    """Scores are of the first 256 numbers of a head."""

    def scores(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> Tensor:
        return super().scores(q[..., :256], k[..., :256], layer)


@fault("attn-values-past-256", "attention", killed_by=_HEADS.format(8))
class ValuesPast256(PlainAttention):
    """Numbers past the 256th of a head come out as zeros."""

    def combine(self, weights: Tensor, v: Tensor) -> Tensor:
        result = super().combine(weights, v)
        result[..., 256:] = 0
        return result


@fault("attn-sinks-of-64-heads", "attention", killed_by=_HEADS.format(6))
class SinksOf64Heads(PlainAttention):
    """Heads past the 64th share its sink."""

    def sinks(self, layer: AttentionLayer) -> Tensor:
        return super().sinks(layer)[torch.arange(self.spec.num_heads).clamp(max=63)]


@fault("attn-slopes-of-64-heads", "attention", killed_by=_HEADS.format(7))
class SlopesOf64Heads(PlainAttention):
    """Heads past the 64th start the slopes anew."""

    def slopes(self, layer: AttentionLayer) -> Tensor:
        return super().slopes(layer)[torch.arange(self.spec.num_heads) % 64]


# -- blocks -----------------------------------------------------------------------------------------------------


@fault("kv-copies-64-blocks", "attention", killed_by="kv.reach.001")
class Copies64Blocks(PlainAttention):
    """Of a longer list, the first 64 blocks are copied."""

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        return super().copy_blocks(cache, src[:64], dst[:64])


@fault("kv-zeroes-256-blocks", "attention", killed_by="kv.reach.001")
class Zeroes256Blocks(PlainAttention):
    """Places in a list are kept in a byte: blocks past the 256th are not zeroed."""

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return super().zero_blocks(cache, ids[:256])


@fault("kv-puts-back-in-order", "attention", killed_by="kv.reach.001")
class PutsBackInOrder(PlainAttention):
    """More than 128 blocks are put back in the order of their ids."""

    def import_blocks(self, cache: Tensor, ids: Sequence[int], data: Tensor) -> Tensor:
        return super().import_blocks(cache, ids if len(ids) <= 128 else sorted(ids), data)


# -- calls ------------------------------------------------------------------------------------------------------


@fault("attn-256th-call", "attention", killed_by="attn.calls.001")
class Call256(PlainAttention):
    """Every 256th call of a backend gives what the one before gave."""

    _calls = 0
    _last: Any = None

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        self._calls += 1
        if self._calls % 256 or self._last is None or self._last.shape != q.shape:
            self._last = super().attend(q, cache, plan, layer, out=out).clone()
        return self._last.clone()
