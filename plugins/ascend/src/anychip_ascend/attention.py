"""Paged attention through the vendor's fused op; and core's reference, for what that op does not serve.

A page holds the keys of its tokens, then their values, as in core's canonical form, so that groups share a pool block
by block. The op wants keys and values as two contiguous tensors of pages. Both are views of one pool: the pool has 2 N
half pages; keys are half pages 0 to 2N - 2, values are 1 to 2N - 1, and block b is number 2b in either. Block tables
and slots are doubled for that, once a step and KV group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import DenseCacheAttention, ReferenceAttention
from anychip.plugin_api import (
    PADDING_SLOT,
    AttentionLayer,
    AttentionSpec,
    BatchView,
    Recorder,
    ShapeKey,
    Unsupported,
)
from anychip_ascend.attention_call import FusedCall
from anychip_ascend.attention_choice import BLOCK_SIZE, AttentionChoice
from anychip_ascend.graph import NpuGraphs
from anychip_ascend.runtime import npu

MAX_ELEMENTS = 2**31 - 1
"""Of one tensor of pages: the op counts them in 32 bits."""

_WITHIN = ~(BLOCK_SIZE - 1)


@dataclass(slots=True)
class HalfPages:
    """A layer's cache. `pages` is the canonical form; the others are views of it."""

    pages: Tensor  # [num_blocks, 2, BLOCK_SIZE, num_kv_heads, head_dim]
    keys: Tensor  # [2 * num_blocks - 1, BLOCK_SIZE, num_kv_heads, head_dim]
    values: Tensor  # as keys, half a page further on


@dataclass(slots=True)
class FusedPlan:
    """A step as the op takes it. In a graph, tensors stay where they are, and lists are renewed for each replay."""

    group: int
    positions: Tensor
    table: Tensor  # [num_rows, num_pages] int32, of half pages
    slots: Tensor  # [num_written] int32, in half pages, none of them negative
    written: Tensor | None
    """Which token is written to each slot; None: the first ones, in order."""
    num_tokens: int
    """Tokens that the op is given: padding that belongs to no row is left out."""
    query_ends: list[int]
    key_lengths: list[int]
    recorder: Recorder | None = None


class FusedAttention(DenseCacheAttention):
    block_sizes = (BLOCK_SIZE,)

    def __init__(self, spec: AttentionSpec, choice: AttentionChoice, mask: Tensor, graphs: NpuGraphs) -> None:
        super().__init__(spec)
        self.name = f"ascend {choice.op}"
        self._mask = mask
        self._graphs = graphs
        self._sinks: dict[int, Tensor] = {}

    # -- storage ------------------------------------------------------------------------------------------

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> HalfPages:  # type: ignore[override]
        spec = self.spec
        half = block_size * spec.num_kv_heads * spec.head_dim
        if (2 * num_blocks - 1) * half > MAX_ELEMENTS:
            fits = (MAX_ELEMENTS // half + 1) // 2
            raise Unsupported(
                self.name,
                [f"{num_blocks} blocks of {half} keys pass what 32 bits count; set --num-kv-blocks to {fits} or fewer"],
            )
        pages = super().make_cache(raw, num_blocks, block_size)
        flat, shape = pages.view(-1), (2 * num_blocks - 1, block_size, spec.num_kv_heads, spec.head_dim)
        return HalfPages(pages, flat[:-half].view(shape), flat[half:].view(shape))

    def copy_blocks(self, cache: HalfPages, src: Sequence[int], dst: Sequence[int]) -> HalfPages:  # type: ignore[override]
        super().copy_blocks(cache.pages, src, dst)
        return cache

    def zero_blocks(self, cache: HalfPages, ids: Sequence[int]) -> HalfPages:  # type: ignore[override]
        super().zero_blocks(cache.pages, ids)
        return cache

    def export_blocks(self, cache: HalfPages, ids: Sequence[int]) -> Tensor:  # type: ignore[override]
        return super().export_blocks(cache.pages, ids)

    def import_blocks(self, cache: HalfPages, ids: Sequence[int], data: Tensor) -> HalfPages:  # type: ignore[override]
        super().import_blocks(cache.pages, ids, data)
        return cache

    # -- a step -------------------------------------------------------------------------------------------

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: FusedPlan | None = None,
        recorder: Recorder | None = None,
    ) -> FusedPlan:
        assert batch.host_seq_lens is not None and batch.host_slot_mapping is not None, "host_lengths is exact"
        ends, lengths = np.cumsum(batch.host_query_lens).tolist(), batch.host_seq_lens.tolist()
        if into is None and recorder is None:
            rows, tokens = len(ends), ends[-1] if ends else 0
            slots, written = batch.slot_mapping[:tokens], None
            if (missing := batch.host_slot_mapping == PADDING_SLOT).any():
                written = torch.from_numpy(np.flatnonzero(~missing)).to(slots.device)
                slots = slots[written]
            table = batch.block_table[:rows] * 2
            return FusedPlan(group, batch.positions, table, _in_half_pages(slots), written, tokens, ends, lengths)
        # A graph's shape is fixed: each padded row has one padded token, and one key, on the null block.
        tokens, rows = shape.num_tokens, shape.num_reqs
        while len(ends) < rows:
            ends.append(min(tokens, (ends[-1] if ends else 0) + 1))
            lengths.append(1)
        slots, written = _without_gaps(batch.slot_mapping)
        if into is not None:
            assert into.written is not None
            torch.mul(batch.block_table, 2, out=into.table)
            into.slots.copy_(_in_half_pages(slots))
            into.written.copy_(written)
            into.query_ends, into.key_lengths = ends, lengths
            return into
        table, slots = batch.block_table * 2, _in_half_pages(slots)
        return FusedPlan(group, batch.positions, table, slots, written, tokens, ends, lengths, recorder)

    def write_kv(  # type: ignore[override]
        self, k: Tensor, v: Tensor, cache: HalfPages, plan: FusedPlan, layer: AttentionLayer
    ) -> HalfPages:
        if plan.written is not None:
            k, v = k.index_select(0, plan.written), v.index_select(0, plan.written)
        else:
            k, v = k[: len(plan.slots)], v[: len(plan.slots)]
        if len(k):
            npu.npu_scatter_pa_kv_cache(
                k.contiguous(), v.contiguous(), cache.keys, cache.values, plan.slots, cache_mode="Norm"
            )
        return cache

    def attend(  # type: ignore[override]
        self, q: Tensor, cache: HalfPages, plan: FusedPlan, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        spec, tokens = self.spec, plan.num_tokens
        call = FusedCall(
            query=q[:tokens].contiguous(),
            key=cache.keys.flatten(2),
            value=cache.values.flatten(2),
            block_table=plan.table,
            mask=self._mask,
            query_ends=plan.query_ends,
            key_lengths=plan.key_lengths,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            scale=float(layer.scale),
            window=spec.window,
            sinks=self._narrow_sinks(layer),
        )
        if plan.recorder is not None and self._graphs.recording is not None:
            result = self._graphs.recording.attend(call, plan.recorder, plan.group)
        elif tokens:
            result = call.run()
        else:
            result = q[:0]
        if out is None and tokens == len(q):
            return result
        padded = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        padded[:tokens].copy_(result)
        padded[tokens:].zero_()
        return padded

    def _narrow_sinks(self, layer: AttentionLayer) -> Tensor | None:
        """In the dtype that the op takes, made once a layer."""
        if layer.sinks is None:
            return None
        if layer.index not in self._sinks:
            self._sinks[layer.index] = layer.sinks.to(torch.bfloat16)
        return self._sinks[layer.index]


def _in_half_pages(slots: Tensor) -> Tensor:
    """Slots of blocks as slots of half pages: token t of block b is token t of half page 2b."""
    return slots + (slots & _WITHIN)


def _without_gaps(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Slots and the tokens to write there, of a graph, whose number of both is fixed. A token that has no slot stands
    for the first that has one, and writes the same bytes to the same place once more: kernels of Atlas A2 and A3 skip
    negative slots, those of Atlas A5 write there. Where no token has a slot, before a graph first runs, token 0 is
    written to the null block, which holds nothing."""
    has_slot = slots >= 0
    first = has_slot.int().argmax()
    written = torch.where(has_slot, torch.arange(len(slots), device=slots.device), first)
    return slots.index_select(0, written).clamp(min=0), written


class PlainAttention(ReferenceAttention):
    """Core's reference on the device, row by row: right for every layer, and slow. It reads lengths on the host, so no
    graph holds it."""

    block_sizes = (BLOCK_SIZE,)

    def __init__(self, spec: AttentionSpec, choice: AttentionChoice, graphs: NpuGraphs) -> None:
        super().__init__(spec)
        self.name = "ascend reference"
        self.why = f"attention on the reference: {choice.why}"
        self._graphs = graphs

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        self._graphs.reads_host(self.why)
        return super().attend(q, cache, plan, layer, out=out)
