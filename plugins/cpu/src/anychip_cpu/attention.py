"""Paged attention through torch's scaled_dot_product_attention. Correct first: blocks are gathered before use.

Decode rows go through one batched call without a loop over requests; each prefill row is a call of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference import DenseCacheAttention, softmax_with_sinks
from anychip.plugin_api import AttentionLayer, BatchView, Recorder, ShapeKey


@dataclass(slots=True)
class DecodeRows:
    """Rows with one query each."""

    tokens: Tensor  # [rows] index of each row's query
    table: Tensor  # [rows, pages]
    visible: Tensor  # [rows, 1, 1, pages * block_size]
    distance: Tensor | None  # of key from query, as `visible`, where ALiBi wants it
    unwritten: Tensor  # [rows, pages, 1, block_size, 1, 1]


@dataclass(slots=True)
class PrefillRow:
    begin: int
    end: int
    blocks: Tensor  # [pages]
    length: int
    first: int
    """Position of the first key that any query sees, at a block's beginning."""
    visible: Tensor | None  # [1, 1, queries, keys]; None: plain causal from position 0
    distance: Tensor | None


@dataclass(slots=True)
class SdpaPlan:
    positions: Tensor
    written: Tensor  # [tokens] the tokens that have a slot
    write_blocks: Tensor
    write_offsets: Tensor
    decode: DecodeRows | None
    prefills: list[PrefillRow]


class SdpaPagedAttention(DenseCacheAttention):
    name = "cpu-sdpa"

    # -- planning -----------------------------------------------------------------------------------------

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> SdpaPlan:
        # The device is the host: reading lengths here waits for nothing.
        size = batch.block_size
        starts, lengths = batch.query_start.numpy(), batch.seq_lens.numpy()
        queries = np.diff(starts)
        single = np.flatnonzero(queries == 1)
        prefills = [
            self._prefill(batch, int(starts[row]), int(starts[row + 1]), int(lengths[row]), row)
            for row in np.flatnonzero(queries > 1).tolist()
        ]
        written = (batch.slot_mapping >= 0).nonzero().squeeze(-1)
        slots = batch.slot_mapping[written]
        return SdpaPlan(
            positions=batch.positions,
            written=written,
            write_blocks=slots // size,
            write_offsets=slots % size,
            decode=self._decode(batch, starts, lengths, single) if len(single) else None,
            prefills=prefills,
        )

    def _decode(self, batch: BatchView, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> DecodeRows:
        size, window = batch.block_size, self.spec.window
        mine = lengths[rows]
        last_page = -(-int(mine.max()) // size)
        first_page = 0 if window is None else max(0, int(mine.min()) - window) // size
        keys = np.arange(first_page * size, last_page * size)
        visible = keys < mine[:, None]
        if window is not None:
            visible &= keys >= mine[:, None] - window
        return DecodeRows(
            tokens=torch.from_numpy(starts[rows].astype(np.int64)),
            table=batch.block_table[torch.from_numpy(rows), first_page:last_page].long(),
            visible=torch.from_numpy(visible)[:, None, None, :],
            distance=torch.from_numpy(keys - mine[:, None] + 1)[:, None, None, :] if self.spec.alibi else None,
            unwritten=torch.from_numpy(~visible).view(len(rows), -1, 1, size, 1, 1),
        )

    def _prefill(self, batch: BatchView, begin: int, end: int, length: int, row: int) -> PrefillRow:
        size, window = batch.block_size, self.spec.window
        start = length - (end - begin)
        first_page = 0 if window is None else max(0, start + 1 - window) // size
        first = first_page * size
        visible = distance = None
        explicit = self.spec.softcap is not None or self.spec.sinks or self.spec.alibi
        if start or window is not None or explicit:
            keys = torch.arange(first, length)
            query = torch.arange(start, length).unsqueeze(-1)
            visible = keys <= query
            if window is not None:
                visible &= keys > query - window
            visible = visible[None, None]
            distance = (keys - query)[None, None] if self.spec.alibi else None
        blocks = batch.block_table[row, first_page : -(-length // size)].long()
        return PrefillRow(begin, end, blocks, length, first, visible, distance)

    # -- running ------------------------------------------------------------------------------------------

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: SdpaPlan, layer: AttentionLayer) -> Tensor:
        if len(plan.written) != len(k):
            k, v = k[plan.written], v[plan.written]
        cache[plan.write_blocks, 0, plan.write_offsets] = self.encode(k, layer.k_scale)
        cache[plan.write_blocks, 1, plan.write_offsets] = self.encode(v, layer.v_scale)
        return cache

    def attend(
        self,
        q: Tensor,
        cache: Tensor,
        plan: SdpaPlan,
        layer: AttentionLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        result = torch.zeros_like(q) if out is None else out.zero_()
        if plan.decode is not None:
            rows = plan.decode
            k, v = self._decode_keys(cache, rows, layer)
            # The query heads of one KV head stand as queries of their own: keys are never repeated.
            queries = q[rows.tokens].view(len(rows.tokens), self.spec.num_kv_heads, -1, self.spec.head_dim)
            attended = self._product(queries, k, v, rows, layer)
            result[rows.tokens] = attended.reshape(-1, *q.shape[1:])
        for row in plan.prefills:
            k, v = self._prefill_keys(cache, row, layer)
            queries = q[row.begin : row.end].transpose(0, 1).unsqueeze(0)  # [1, heads, queries, dim]
            attended = self._product(queries, k, v, row, layer)
            result[row.begin : row.end] = attended[0].transpose(0, 1)
        return result

    def _decode_keys(self, cache: Tensor, rows: DecodeRows, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, keys, dim] of rows with one query each."""
        # A mask is added to the scores and a weight of zero multiplies a value, so what free blocks hold, which
        # may be anything, must become zeros first.
        pages = cache[rows.table].masked_fill(rows.unwritten, 0)  # [rows, pages, 2, block_size, kv_heads, dim]
        k = self.decode(pages[:, :, 0], layer.k_scale).flatten(1, 2).transpose(1, 2)  # [rows, kv_heads, keys, dim]
        v = self.decode(pages[:, :, 1], layer.v_scale).flatten(1, 2).transpose(1, 2)
        return k, v

    def _prefill_keys(self, cache: Tensor, row: PrefillRow, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, keys, dim] of one row."""
        pages = cache[row.blocks]  # [pages, 2, block_size, kv_heads, dim]
        keys = row.length - row.first
        k = self.decode(pages[:, 0].flatten(0, 1)[:keys], layer.k_scale).transpose(0, 1).unsqueeze(0)
        v = self.decode(pages[:, 1].flatten(0, 1)[:keys], layer.v_scale).transpose(0, 1).unsqueeze(0)
        if self.spec.window is not None and row.visible is not None:
            # The first page may begin before the window, in a block that holds another request's bytes by now.
            passed = ~row.visible.any(dim=-2).unsqueeze(-1)
            k, v = k.masked_fill(passed, 0), v.masked_fill(passed, 0)
        repeat = self.spec.num_heads // self.spec.num_kv_heads
        return k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)

    def _product(self, q: Tensor, k: Tensor, v: Tensor, rows: DecodeRows | PrefillRow, layer: AttentionLayer) -> Tensor:
        """q [rows, heads, queries, dim] over k and v [rows, heads, keys, dim]. In a decode batch, `heads` are the KV
        heads and `queries` the query heads that share one."""
        cap, scale, visible = self.spec.softcap, layer.scale, rows.visible
        if cap is None and layer.sinks is None and layer.alibi_slopes is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale)
        assert visible is not None
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if layer.alibi_slopes is not None:
            assert rows.distance is not None
            scores = scores + layer.alibi_slopes.view(1, q.shape[1], -1, 1) * rows.distance
        sinks = None if layer.sinks is None else layer.sinks.view(1, q.shape[1], -1, 1)
        weights = softmax_with_sinks(scores.masked_fill(~visible, -torch.inf), sinks)
        return (weights @ v.float()).to(q.dtype)
