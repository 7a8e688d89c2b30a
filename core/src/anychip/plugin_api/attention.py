"""Paged attention: the spec that core asks for, and the backend's contract.

Dimension names are those of docs/glossary.md. A backend owns its cache's layout; core owns which block is whose.
Queries, keys and values may be views: see Form in plugin_api/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anychip.errors import Unsupported
from anychip.plugin_api.cache import Cache, CacheBackend, CanonicalArray, plain_bytes, stored_dtype
from anychip.plugin_api.plan import BatchView, Plan, Recorder
from anychip.plugin_api.sharding import REPLICATED, Placed
from anychip.types import DType

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.plugin_api.graph import ShapeKey
    from anychip.plugin_api.ops import Ops, QKNorm, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What one KV group's layers need. Head counts are those of this rank: num_kv_heads is what `pages` leaves it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: DType
    kv_dtype: DType
    window: int | None = None
    """A query at position p sees keys at p - window + 1 to p."""
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    lse: bool = False
    """Asks for forward_with_lse too: layers whose keys are attended to in parts, which are merged."""
    kind: ClassVar[str] = "decoder"
    """For plugins of 0.1, which ask: other kinds are specs of their own now."""
    invariant: bool = False
    """Asks for kernels whose result for a row does not depend on the rest of the batch."""
    pages: Placed = REPLICATED
    """How the whole model's pages lie over the ranks, in canonical form [2, block_size, num_kv_heads, head_dim]."""

    def canonical(self, block_size: int) -> tuple[CanonicalArray, ...]:
        """Keys, then values."""
        shape = (2, block_size, self.num_kv_heads, self.head_dim)
        return (CanonicalArray("kv", shape, stored_dtype(self.kv_dtype)),)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """How a backend stores one layer's keys and values.

    `page_bytes(block_size)` is the size of one block of one layer; groups share a pool when these match.
    """

    block_sizes: tuple[int, ...]
    page_bytes: Callable[[int], int]
    alignment: int = 64
    opaque: bool = False
    """Whether core may only move blocks through export_blocks and import_blocks."""


def dense_page_bytes(spec: AttentionSpec) -> Callable[[int], int]:
    """Page size of the plain layout: keys and values of every token, nothing else."""
    return lambda block_size: plain_bytes(spec, block_size)


@dataclass(slots=True, kw_only=True)
class AttentionLayer:
    """What is fixed for one layer: `scale` multiplies q.k. A cache of one byte per value holds k / k_scale and
    v / v_scale, rounded to nearest and kept within the dtype's range: one scale for the layer, [1], or one for each
    head, [num_kv_heads]; float32, 1 where the checkpoint has none.

    A sink is a logit that takes part in its head's softmax and has no value. ALiBi adds alibi_slopes[head] times
    (key position - query position) to the score.
    """

    index: int
    scale: float
    ops: Ops
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    sinks: Tensor | None = None  # [num_heads] float32
    alibi_slopes: Tensor | None = None  # [num_heads] float32


@dataclass(frozen=True, slots=True)
class PartialAttention:
    """Attention over some of a query's keys, and what another part needs to be merged with it.

    `lse` is the natural logarithm of the sum of e^score over the keys that a query sees, its head's sink included where
    the layer has one. A score is scaled, capped and biased, as the softmax sees it. A query that sees no key, and a
    padded row, has -inf (with sinks, the former has its sink), and zeros in `out`.
    """

    out: Tensor  # [num_tokens, num_heads, head_dim]
    lse: Tensor  # [num_tokens, num_heads] float32


class AttentionBackend(CacheBackend):
    """A subclass writes kv_layout, make_cache, plan, write_kv, attend, copy_blocks and zero_blocks; or
    overrides forward whole, when its kernel fuses them or its cache is functional."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    def kv_layout(self) -> KVLayout:
        """Allowed block sizes and bytes per block."""
        raise Unsupported(self.name, ["kv_layout is not implemented"])

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Cache:
        """A cache over `raw`, uint8 [num_blocks * page_bytes(block_size)], which it must not copy: groups
        share it, block by block."""
        raise Unsupported(self.name, ["make_cache is not implemented"])

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: Plan | None = None,
        recorder: Recorder | None = None,
    ) -> Plan:
        """Prepares a step for one KV group.

        `into` rewrites a captured plan's arrays in place on the stream: its static fields follow from `shape`
        alone. `recorder` is given at capture: host arguments that change per replay are registered with it.
        """
        return batch

    def forward(
        self,
        q: Tensor,  # [num_tokens, num_heads, head_dim]
        k: Tensor | None,  # [num_tokens, num_kv_heads, head_dim]; None: another layer's cache is read
        v: Tensor | None,
        cache: Cache,
        plan: Plan,
        layer: AttentionLayer,
        *,
        rope: Rope | None = None,
        qk_norm: QKNorm | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Attention output [num_tokens, num_heads, head_dim] and the cache after the write.

        Padded rows come back as zeros. `out` offers storage that a backend may use for the result. The default
        norms and rotates, writes keys and values, then attends.
        """
        q, cache = self.rotate_and_write(q, k, v, cache, plan, layer, rope, qk_norm)
        return self.attend(q, cache, plan, layer, out=out), cache

    def forward_with_lse(
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
    ) -> tuple[PartialAttention, Cache]:
        """As forward, with the log-sum-exp. Called where the spec has `lse`, which Platform.attention refuses unless
        Capabilities.attention_lse declares it.

        The part is the batch's: a row of one query over some of its sequence's blocks, with the number of their tokens
        in seq_lens, 0 where it has none. What a query sees follows from query_start and seq_lens alone; positions are
        those of the whole sequence, and so rotate right. Windows and ALiBi count from the part's last key: only the
        part that holds the query's own key has them right. Only one part may have sinks; others get -inf.
        """
        q, cache = self.rotate_and_write(q, k, v, cache, plan, layer, rope, qk_norm)
        return self.attend_with_lse(q, cache, plan, layer, out=out), cache

    def rotate_and_write(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Cache,
        plan: Plan,
        layer: AttentionLayer,
        rope: Rope | None,
        qk_norm: QKNorm | None,
    ) -> tuple[Tensor, Cache]:
        """Queries after norm and rotary, and the cache with the new keys and values."""
        if rope is not None or qk_norm is not None:
            q, k = layer.ops.qkv_norm_rope(q=q, k=k, positions=self.positions(plan), rope=rope, qk_norm=qk_norm)
        if k is not None and v is not None:
            cache = self.write_kv(k, v, cache, plan, layer)
        return q, cache

    def positions(self, plan: Plan) -> Tensor:
        """Token positions [num_tokens] of a plan, for the default forward."""
        positions: Tensor = plan.positions
        return positions

    def write_kv(self, k: Tensor, v: Tensor, cache: Cache, plan: Plan, layer: AttentionLayer) -> Cache:
        """Writes each token at its slot; a token of slot PADDING_SLOT is not written."""
        raise Unsupported(self.name, ["write_kv is not implemented"])

    def attend(
        self,
        q: Tensor,
        cache: Cache,
        plan: Plan,
        layer: AttentionLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of every query over the keys of its row, causal, within the window."""
        raise Unsupported(self.name, ["attend is not implemented"])

    def attend_with_lse(
        self,
        q: Tensor,
        cache: Cache,
        plan: Plan,
        layer: AttentionLayer,
        *,
        out: Tensor | None = None,
    ) -> PartialAttention:
        """As attend, with the log-sum-exp."""
        raise Unsupported(self.name, ["attend_with_lse is not implemented"])

    def export_arrays(self, cache: Cache, ids: Sequence[int]) -> dict[str, Tensor]:
        return {"kv": self.export_blocks(cache, ids)}

    def import_arrays(self, cache: Cache, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> Cache:
        return self.import_blocks(cache, ids, arrays["kv"])

    def export_blocks(self, cache: Cache, ids: Sequence[int]) -> Tensor:
        """The array kv of the canonical form, [len(ids), 2, block_size, num_kv_heads, head_dim]: keys, then values, in
        the cache's dtype; as uint8 where that is one byte wide."""
        raise Unsupported(self.name, ["export_blocks is not implemented"])

    def import_blocks(self, cache: Cache, ids: Sequence[int], data: Tensor) -> Cache:
        """The inverse of export_blocks."""
        raise Unsupported(self.name, ["import_blocks is not implemented"])
