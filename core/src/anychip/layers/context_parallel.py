"""Context parallelism: the keys and values of a sequence lie over the ranks of the axis cp, block by block.

This file alone knows where a key lies. The scheduler and the KV manager know one pool, whose blocks have
`size * block_size` tokens. On the device such a block is one block of `block_size` tokens on every rank, under the same
id. So the n-th `block_size` tokens of a sequence lie on rank n mod size, and these hold as they are: tables of blocks,
copies, zeroing, prefix caching and preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from anychip.errors import Unsupported
from anychip.ops.reference import merge_attention
from anychip.plugin_api import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchView,
    CacheBackend,
    CacheSpec,
    Communicator,
    KVLayout,
    Mesh,
    PartialAttention,
    Platform,
    QKNorm,
    Recorder,
    Rope,
    ShapeKey,
)
from anychip.plugin_api.cache import Cache
from anychip.plugin_api.plan import Plan
from anychip.types import PADDING_SLOT, cdiv


def is_shared(spec: CacheSpec) -> bool:
    """Whether what a layer keeps is divided over the ranks of cp: full attention over every key. A window and a state
    are no longer for a longer context, so each rank keeps them whole."""
    return isinstance(spec, AttentionSpec) and spec.window is None


def attention_backend(platform: Platform, spec: AttentionSpec, mesh: Mesh) -> AttentionBackend:
    """The platform's, over this rank's share of the keys where the mesh has several contexts."""
    if mesh.shape.cp == 1 or not is_shared(spec):
        return platform.attention(spec)
    return ContextAttention(platform.attention(replace(spec, lse=True)), mesh.axis("cp"))


def cache_backend(platform: Platform, spec: CacheSpec, mesh: Mesh) -> CacheBackend:
    """As attention_backend, of any kind of layer."""
    if mesh.shape.cp > 1 and isinstance(spec, AttentionSpec):
        return attention_backend(platform, spec, mesh)
    return platform.cache_backend(spec)


def contexts_of(backend: CacheBackend) -> int:
    """Ranks over which a block of the pool lies: its tokens are so many times those of a block on one of them."""
    return backend.axis.size if isinstance(backend, ContextAttention) else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShare:
    """Which keys of a sequence are a rank's: every `size`-th block of `block_size` tokens, beginning with the
    `rank`-th."""

    size: int
    rank: int
    block_size: int

    @property
    def span(self) -> int:
        """Tokens of a block of the pool, over all ranks."""
        return self.size * self.block_size

    def num_held(self, num_keys: Tensor) -> Tensor:
        """How many of the first so many keys of a sequence this rank holds."""
        return num_keys // self.span * self.block_size + self._in_last(num_keys % self.span)

    def slots(self, slots: Tensor) -> Tensor:
        """Where this rank writes tokens that have these slots in the pool; PADDING_SLOT: another rank writes it."""
        offset = slots % self.span - self.rank * self.block_size
        mine = (slots >= 0) & (offset >= 0) & (offset < self.block_size)
        return torch.where(mine, slots // self.span * self.block_size + offset, PADDING_SLOT)

    def _in_last(self, num_keys: Tensor) -> Tensor:
        """Of the first keys of one block of the pool."""
        return (num_keys - self.rank * self.block_size).clamp(0, self.block_size)

    def view(self, batch: BatchView) -> BatchView:
        """A step as attention over this rank's keys sees it: every query is a row of its own, since of this rank's keys
        those that two queries see differ by as many as the rank holds between them."""
        lens = batch.host_query_lens
        if bool((lens == 1).all()) and batch.num_tokens == batch.num_reqs:
            rows, seq_lens = None, batch.seq_lens  # a query is a row already
        else:
            rows, seq_lens = _rows_of_queries(batch)
        keys, slots = batch.host_seq_lens, batch.host_slot_mapping
        table = batch.block_table
        if rows is not None:
            # A table a query: no wider than the longest sequence needs, where the host knows that.
            table = (table if keys is None else table[:, : max(1, cdiv(int(keys.max(initial=0)), self.span))])[rows]
        ones = np.ones(int(lens.sum()), dtype=lens.dtype)
        starts = torch.arange(batch.num_tokens + 1, dtype=batch.query_start.dtype, device=table.device)
        return replace(
            batch,
            query_start=torch.minimum(starts, batch.query_start[-1]),
            seq_lens=self.num_held(seq_lens).to(batch.seq_lens.dtype),
            block_table=table,
            slot_mapping=self.slots(batch.slot_mapping),
            num_reqs=batch.num_tokens,
            max_query_len=min(1, len(ones)),
            block_size=self.block_size,
            host_query_lens=ones,
            host_seq_lens=None if keys is None else _on_host(self.num_held, _keys_of_queries(lens, keys)),
            host_slot_mapping=None if slots is None else _on_host(self.slots, slots),
        )


def _on_host(fn: Callable[[Tensor], Tensor], values: np.ndarray) -> np.ndarray:
    """The same rule for the host's arrays."""
    found: np.ndarray = fn(torch.from_numpy(values)).numpy()
    return found


def _rows_of_queries(batch: BatchView) -> tuple[Tensor, Tensor]:
    """By token, its row, and how many keys it sees: [num_tokens] each. A padded token sees none."""
    starts = batch.query_start
    tokens = torch.arange(batch.num_tokens, dtype=starts.dtype, device=starts.device)
    rows = torch.searchsorted(starts[1:].contiguous(), tokens, right=True).clamp(max=batch.num_reqs - 1)
    keys = batch.seq_lens[rows] - (starts[rows + 1] - 1 - tokens)
    return rows, keys.masked_fill(tokens >= starts[-1], 0)


def _keys_of_queries(query_lens: np.ndarray, seq_lens: np.ndarray) -> np.ndarray:
    """As _rows_of_queries counts keys, on the host and without padding: [tokens]."""
    ends = np.cumsum(query_lens)
    return np.repeat(seq_lens - ends + 1, query_lens) + np.arange(int(query_lens.sum()))


class ContextAttention(AttentionBackend):
    """`part` attends over this rank's keys, and the ranks of `axis` merge what they found, by its log-sum-exp. All of
    them have all queries, and all get the same bits."""

    def __init__(self, part: AttentionBackend, axis: Communicator) -> None:
        super().__init__(part.spec)
        self.name = f"{part.name}, shared by {axis.size} contexts"
        self.part, self.axis = part, axis
        self._without_sinks: AttentionLayer | None = None

    def share(self, block_size: int) -> ContextShare:
        """Of blocks of the pool of this size."""
        return ContextShare(size=self.axis.size, rank=self.axis.rank, block_size=block_size // self.axis.size)

    # -- the cache: what the pool calls a block is one block here -----------------------------------------

    def kv_layout(self) -> KVLayout:
        layout, size = self.part.kv_layout(), self.axis.size
        sizes = tuple(each * size for each in layout.block_sizes)
        return replace(layout, block_sizes=sizes, page_bytes=lambda block_size: layout.page_bytes(block_size // size))

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Cache:
        return self.part.make_cache(raw, num_blocks, block_size // self.axis.size)

    def copy_blocks(self, cache: Cache, src: Sequence[int], dst: Sequence[int]) -> Cache:
        return self.part.copy_blocks(cache, src, dst)

    def zero_blocks(self, cache: Cache, ids: Sequence[int]) -> Cache:
        return self.part.zero_blocks(cache, ids)

    # -- a step -------------------------------------------------------------------------------------------

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: Plan | None = None,
        recorder: Recorder | None = None,
    ) -> Plan:
        """Of a step that is not captured: the plan's arrays are made anew."""
        if into is not None or recorder is not None:
            raise Unsupported(self.name, ["steps of several contexts are not captured"])
        mine = self.share(batch.block_size).view(batch)
        shape = replace(shape, num_reqs=mine.num_reqs, max_query_len=1, num_pages=mine.block_table.shape[1])
        return self.part.plan(mine, shape, group=group)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Cache,
        plan: Plan,
        layer: AttentionLayer,
        *,
        rope: Rope | None = None,
        qk_norm: QKNorm | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        mine = self._own(layer)
        part, cache = self.part.forward_with_lse(q, k, v, cache, plan, mine, rope=rope, qk_norm=qk_norm)
        return self._merged(part), cache

    def _own(self, layer: AttentionLayer) -> AttentionLayer:
        """A sink counts once: the first rank has it."""
        if layer.sinks is None or self.axis.rank == 0:
            return layer
        if self._without_sinks is None:
            self._without_sinks = replace(layer, sinks=torch.full_like(layer.sinks, -torch.inf))
        return self._without_sinks

    def _merged(self, part: PartialAttention) -> Tensor:
        """[num_tokens, num_heads, head_dim] over the keys of all ranks. One message: to meet takes longer than to send
        narrow values as wide ones."""
        sent = torch.cat((part.out.float(), part.lse.unsqueeze(-1)), dim=-1)  # [num_tokens, num_heads, head_dim + 1]
        found = self.axis.all_gather(sent.unsqueeze(0), dim=0)
        parts = [PartialAttention(each[..., :-1], each[..., -1]) for each in found]
        return merge_attention(*parts).out.to(part.out.dtype)
