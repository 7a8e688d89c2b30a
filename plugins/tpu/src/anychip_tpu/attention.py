"""Paged attention as XLA compiles it: gathers of pages and plain products, over a functional cache.

A page is [block_size, 2 * num_kv_heads, head_dim]: each head's keys and then its values, so that a share of the heads
is a share of one dimension, and a head's pair lies together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.ops.reference import BYTE_RANGES, attend_gathered, last_copies
from anychip.plugin_api import (
    AttentionBackend,
    AttentionLayer,
    BatchView,
    KVLayout,
    PartialAttention,
    Placed,
    Recorder,
    ShapeKey,
    Sharded,
    dense_page_bytes,
)
from anychip.plugin_api.plan import Plan

BLOCK_SIZES = (16, 128)
"""Tokens of a page: few for short requests, and as many as a TPU's lanes for long ones."""
_GATHERED_BYTES = 64 << 20
"""Of pages at once: what a step gathers for its tokens beyond that comes in turns."""


@dataclass(frozen=True, slots=True)
class PagedPlan:
    positions: Tensor  # [num_tokens]
    last_keys: Tensor  # [num_tokens], the last key that each token sees, counted from its row's first
    slots: Tensor  # [num_tokens] int64
    rows: Tensor  # [num_tokens] of each token
    tables: Tensor  # [num_reqs, pages]
    valid: Tensor  # [num_tokens] bool: whether a token is a row's
    query_start: Tensor  # [num_reqs + 1]
    seq_lens: Tensor  # [num_reqs]


def paged_plan(positions: Tensor, slots: Tensor, starts: Tensor, lengths: Tensor, tables: Tensor) -> PagedPlan:
    """starts [num_reqs + 1], lengths [num_reqs], tables [num_reqs, pages]. Reads nothing on the host."""
    tokens = torch.arange(positions.shape[0], device=positions.device)
    rows = (tokens.unsqueeze(-1) >= starts[1:]).sum(dim=-1).clamp(max=starts.shape[0] - 2)
    last_keys = lengths[rows] - starts[rows + 1] + tokens
    return PagedPlan(positions, last_keys, slots.long(), rows, tables.long(), tokens < starts[-1], starts, lengths)


class PagedAttention(AttentionBackend):
    """Every shape follows from the inputs', and no value is read on the host."""

    name = "xla"

    def kv_layout(self) -> KVLayout:
        return KVLayout(block_sizes=BLOCK_SIZES, page_bytes=dense_page_bytes(self.spec))

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Tensor:
        # A device's arrays are typed and read as no other dtype, so the step program makes its caches without this.
        return raw.cpu().view(self.cache_dtype).view(self.cache_shape(num_blocks, block_size)).to(raw.device)

    def cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
        return num_blocks, block_size, 2 * self.spec.num_kv_heads, self.spec.head_dim

    def cache_placement(self) -> Placed:
        """How a cache lies over devices where pages are placed as the spec says: a head's keys and values together."""
        return tuple(Sharded(dim=2, unit=2, axis=each.axis, uneven=each.uneven) for each in self.spec.pages)

    @property
    def cache_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.spec.kv_dtype)
        return dtype

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: Plan | None = None,
        recorder: Recorder | None = None,
    ) -> PagedPlan:
        return paged_plan(batch.positions, batch.slot_mapping, batch.query_start, batch.seq_lens, batch.block_table)

    # -- writing ------------------------------------------------------------------------------------------

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: PagedPlan, layer: AttentionLayer) -> Tensor:
        pairs = torch.stack((self._narrow(k, layer.k_scale), self._narrow(v, layer.v_scale)), dim=2).flatten(1, 2)
        flat = cache.flatten(0, 1)  # [blocks * block_size, 2 * num_kv_heads, head_dim]
        # Padding goes nowhere: the null block's first slot keeps what it has.
        written = plan.slots >= 0
        target = torch.where(written, plan.slots, 0)
        kept = flat[:1].expand(len(target), -1, -1)
        flat = flat.index_copy(0, target, torch.where(written[:, None, None], pairs, kept))
        return flat.unflatten(0, cache.shape[:2])

    def _narrow(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """[num_tokens, num_kv_heads, head_dim] as the cache holds them."""
        most = BYTE_RANGES.get(self.spec.kv_dtype)
        if most is None:
            return x
        scaled = (x.float() if scale is None else x.float() / scale.view(-1, 1)).clamp(-most, most)
        return (scaled.round() if self.spec.kv_dtype == "int8" else scaled).to(self.cache_dtype)

    def _widened(self, held: Tensor, scale: Tensor | None) -> Tensor:
        """The inverse, float32."""
        wide = held.float()
        if self.spec.kv_dtype not in BYTE_RANGES:
            return wide
        wide = wide if scale is None else wide * scale.view(-1, 1)
        return wide.to(getattr(torch, self.spec.dtype)).float()

    # -- attending ----------------------------------------------------------------------------------------

    def attend(
        self, q: Tensor, cache: Tensor, plan: PagedPlan, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        return torch.cat([self._attended(q, cache, plan, layer, turn)[0] for turn in self._turns(q, cache, plan)])

    def attend_with_lse(
        self, q: Tensor, cache: Tensor, plan: PagedPlan, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> PartialAttention:
        parts = [self._attended(q, cache, plan, layer, turn) for turn in self._turns(q, cache, plan)]
        return PartialAttention(torch.cat([out for out, _ in parts]), torch.cat([log_sum() for _, log_sum in parts]))

    def _turns(self, q: Tensor, cache: Tensor, plan: PagedPlan) -> list[slice]:
        """Tokens by turn, so that what is gathered for them at once stays small."""
        by_token = plan.tables.shape[1] * cache[0].numel() * 4
        size = max(1, _GATHERED_BYTES // by_token)
        return [slice(start, start + size) for start in range(0, len(q), size)]

    def _attended(
        self, q: Tensor, cache: Tensor, plan: PagedPlan, layer: AttentionLayer, turn: slice
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """attend_gathered of a turn's tokens."""
        pages = cache[plan.tables[plan.rows[turn]]].flatten(1, 2)  # [tokens, keys, 2 * num_kv_heads, head_dim]
        pairs = pages.unflatten(2, (self.spec.num_kv_heads, 2))
        k = self._widened(pairs[:, :, :, 0], layer.k_scale)
        v = self._widened(pairs[:, :, :, 1], layer.v_scale)
        return attend_gathered(q[turn], k, v, plan.last_keys[turn], plan.valid[turn], self.spec, layer)

    # -- blocks -------------------------------------------------------------------------------------------

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        sources, destinations = last_copies(src, dst)
        return cache.index_copy(0, _ids(cache, destinations), cache[_ids(cache, sources)])

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return cache.index_fill(0, _ids(cache, ids), 0)

    def export_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        pairs = cache[_ids(cache, ids)].unflatten(2, (self.spec.num_kv_heads, 2))
        canonical = pairs.permute(0, 3, 1, 2, 4)  # [blocks, 2, block_size, num_kv_heads, head_dim]
        if self.spec.kv_dtype not in BYTE_RANGES:
            return canonical
        return canonical.cpu().contiguous().view(torch.uint8).to(cache.device)

    def import_blocks(self, cache: Tensor, ids: Sequence[int], data: Tensor) -> Tensor:
        if self.spec.kv_dtype in BYTE_RANGES:
            data = data.cpu().contiguous().view(self.cache_dtype).to(cache.device)
        return cache.index_copy(0, _ids(cache, ids), data.permute(0, 2, 3, 1, 4).flatten(2, 3).to(cache.dtype))


def _ids(cache: Tensor, ids: Sequence[int]) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=cache.device)
