"""Latent attention (MLA): one row per token that all heads share, and the backend's contract. It may be sparse: a query
attends to the tokens that it chose by keys of their own. What projections gave may be views: see Form in
plugin_api/ops.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anychip.errors import Unsupported
from anychip.plugin_api.attention import KVLayout
from anychip.plugin_api.cache import Cache, CacheBackend, CanonicalArray, plain_bytes, stored_dtype
from anychip.plugin_api.plan import BatchView, Plan, Recorder
from anychip.plugin_api.sharding import REPLICATED, Placed
from anychip.types import DType

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.plugin_api.graph import ShapeKey
    from anychip.plugin_api.ops import Ops, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """What one group of latent layers needs. `num_heads` is that of this rank."""

    num_heads: int
    latent_dim: int
    rope_dim: int
    """Values of a row, behind the latent ones, that carry the position and are keys as they are."""
    nope_dim: int
    """Values of a head's key that are made from the latent ones."""
    v_dim: int
    dtype: DType
    kv_dtype: DType
    window: int | None = None
    index_dim: int = 0
    """Values of a token's index key, by which queries choose tokens. 0: they attend to all, and choose nothing."""
    top_k: int = 0
    """How many tokens a query chooses, where there are index keys."""
    invariant: bool = False
    pages: ClassVar[Placed] = REPLICATED
    """As AttentionSpec.pages: heads are divided over the ranks, the rows that they share are not."""

    @property
    def row_dim(self) -> int:
        return self.latent_dim + self.rope_dim

    def canonical(self, block_size: int) -> tuple[CanonicalArray, ...]:
        stored = stored_dtype(self.kv_dtype)
        rows = CanonicalArray("latent", (block_size, self.row_dim), stored)
        if not self.index_dim:
            return (rows,)
        return rows, CanonicalArray("index", (block_size, self.index_dim), stored)


def latent_page_bytes(spec: LatentSpec) -> Callable[[int], int]:
    """Page size of the plain layout: the row of every token, and its index key where it has one; nothing else."""
    return lambda block_size: plain_bytes(spec, block_size)


@dataclass(slots=True, kw_only=True)
class LatentLayer:
    """What is fixed for one layer: `scale` multiplies q.k. A head's key is k_up[head] @ latent, then the row's rotated
    values; its value is v_up[head] @ latent."""

    index: int
    scale: float
    ops: Ops
    k_up: Tensor  # [num_heads, nope_dim, latent_dim]
    v_up: Tensor  # [num_heads, v_dim, latent_dim]

    def turned(self, q_rope: Tensor, k_rope: Tensor, positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Queries [num_tokens, num_heads, rope_dim] and keys [num_tokens, rope_dim] at their positions."""
        k_turned = self.ops.rotary(x=k_rope.unsqueeze(1), positions=positions, rope=rope).squeeze(1)
        return self.ops.rotary(x=q_rope, positions=positions, rope=rope), k_turned


@dataclass(slots=True, kw_only=True)
class IndexInputs:
    """What a layer's tokens choose by. All ranks have the same, since their heads share what is chosen."""

    queries: Tensor  # [num_tokens, num_index_heads, index_dim]
    keys: Tensor  # [num_tokens, index_dim]
    weights: Tensor  # [num_tokens, num_index_heads] float32

    def turned(self, ops: Ops, positions: Tensor, rope: Rope) -> IndexInputs:
        """With the first rotary_dim values of queries and keys rotated."""
        keys = ops.rotary(x=self.keys.unsqueeze(1), positions=positions, rope=rope).squeeze(1)
        queries = ops.rotary(x=self.queries, positions=positions, rope=rope)
        return IndexInputs(queries=queries, keys=keys, weights=self.weights)


class LatentBackend(CacheBackend):
    """A subclass writes kv_layout, make_cache, write_rows, attend and CacheBackend's methods; or overrides forward
    whole. It may expand the rows to keys and values, or fold k_up into the query and v_up into the output. One that
    serves specs with index keys (Capabilities.sparse_latent) writes write_index, choose_tokens and attend_chosen
    too; or overrides choose whole."""

    def __init__(self, spec: LatentSpec) -> None:
        self.spec = spec

    def kv_layout(self) -> KVLayout:
        """As AttentionBackend.kv_layout."""
        raise Unsupported(self.name, ["kv_layout is not implemented"])

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Cache:
        """As AttentionBackend.make_cache."""
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
        """As AttentionBackend.plan."""
        return batch

    def forward(
        self,
        q_nope: Tensor,  # [num_tokens, num_heads, nope_dim]
        q_rope: Tensor,  # [num_tokens, num_heads, rope_dim]
        latent: Tensor,  # [num_tokens, latent_dim]
        k_rope: Tensor,  # [num_tokens, rope_dim]
        cache: Cache,
        plan: Plan,
        layer: LatentLayer,
        *,
        rope: Rope | None = None,
        chosen: Tensor | None = None,  # what choose returned
        out: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Attention output [num_tokens, num_heads, v_dim] and the cache after the write; padded rows are zeros. The
        default rotates, writes rows, then attends, to what is `chosen` if it is given."""
        if rope is not None:
            q_rope, k_rope = layer.turned(q_rope, k_rope, plan.positions, rope)
        cache = self.write_rows(latent, k_rope, cache, plan, layer)
        if chosen is not None:
            return self.attend_chosen(q_nope, q_rope, cache, plan, layer, chosen, out=out), cache
        return self.attend(q_nope, q_rope, cache, plan, layer, out=out), cache

    def choose(
        self, index: IndexInputs, cache: Cache, plan: Plan, layer: LatentLayer, *, rope: Rope | None = None
    ) -> tuple[Tensor, Cache]:
        """Writes each token's index key at its slot, then chooses for every query. Returns int32 [num_tokens, top_k]
        and the cache: positions in the query's sequence, ascending; behind them -1 where there are fewer, and
        throughout for padded tokens.

        A token's score is the sum over index heads of weight * max(0, query . key). A query chooses the top_k tokens of
        the greatest scores among those before it and itself; of equal scores the lower position comes first. A score
        that is no number counts as the lowest. Source: DeepSeek-AI, "DeepSeek-V3.2-Exp", 2025, section 2.1.
        """
        if rope is not None:
            index = index.turned(layer.ops, plan.positions, rope)
        cache = self.write_index(index.keys, cache, plan, layer)
        return self.choose_tokens(index.queries, index.weights, cache, plan, layer), cache

    def write_rows(self, latent: Tensor, k_rope: Tensor, cache: Cache, plan: Plan, layer: LatentLayer) -> Cache:
        """Writes each token's row at its slot, latent values first; a token of slot PADDING_SLOT is not written."""
        raise Unsupported(self.name, ["write_rows is not implemented"])

    def attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Cache,
        plan: Plan,
        layer: LatentLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of every query over the rows of its sequence, causal, within the window."""
        raise Unsupported(self.name, ["attend is not implemented"])

    def write_index(self, keys: Tensor, cache: Cache, plan: Plan, layer: LatentLayer) -> Cache:
        """Writes each token's index key at its slot; a token of slot PADDING_SLOT is not written."""
        raise Unsupported(self.name, ["write_index is not implemented"])

    def choose_tokens(self, queries: Tensor, weights: Tensor, cache: Cache, plan: Plan, layer: LatentLayer) -> Tensor:
        """`choose`'s choice, by index keys that are written."""
        raise Unsupported(self.name, ["choose_tokens is not implemented"])

    def attend_chosen(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Cache,
        plan: Plan,
        layer: LatentLayer,
        chosen: Tensor,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """As attend, over the rows at the chosen positions of the query's sequence alone."""
        raise Unsupported(self.name, ["attend_chosen is not implemented"])
