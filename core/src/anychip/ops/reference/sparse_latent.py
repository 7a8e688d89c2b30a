"""Sparse latent attention: index keys beside the rows of any dense backend, and attention to what queries chose.

Source: DeepSeek-AI, "DeepSeek-V3.2-Exp", 2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anychip.ops.reference.block_moves import last_copies
from anychip.plugin_api import (
    BatchView,
    KVLayout,
    LatentBackend,
    LatentLayer,
    LatentSpec,
    Recorder,
    ShapeKey,
    latent_page_bytes,
)
from anychip.plugin_api.cache import Cache
from anychip.plugin_api.plan import Plan

_MOST_SCORES = 1 << 24
"""Products of query, head and key that are held at once."""
_MOST_ROWS = 1 << 16
"""Chosen rows that are gathered at once."""


@dataclass(slots=True)
class SparseCache:
    rows: Cache
    """The dense backend's."""
    index: Tensor  # [num_blocks, block_size, index_dim]


@dataclass(slots=True)
class SparsePlan:
    dense: Plan
    view: BatchView

    @property
    def positions(self) -> Tensor:
        return self.view.positions


@dataclass(slots=True)
class _Row:
    """A sequence with queries in the step."""

    begin: int
    end: int
    start: int
    """Position of its first query."""
    blocks: Tensor  # [pages]


class SparseLatent(LatentBackend):
    """`dense` lays out, writes and attends to the rows, and is asked where no sequence has more tokens than a query
    chooses. Index keys lie behind all rows. Computes in float32; reads lengths on the host."""

    def __init__(self, spec: LatentSpec, dense: LatentBackend) -> None:
        super().__init__(spec)
        self.name = f"sparse-{dense.name}"
        self._dense = dense

    def kv_layout(self) -> KVLayout:
        rows = self._dense.kv_layout()
        keys = latent_page_bytes(_index_alone(self.spec))
        return replace(rows, page_bytes=lambda size: rows.page_bytes(size) + keys(size))

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> SparseCache:
        split = num_blocks * self._dense.kv_layout().page_bytes(block_size)
        index = raw[split:].view(getattr(torch, self.spec.kv_dtype)).view(num_blocks, block_size, self.spec.index_dim)
        return SparseCache(self._dense.make_cache(raw[:split], num_blocks, block_size), index)

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: SparsePlan | None = None,
        recorder: Recorder | None = None,
    ) -> SparsePlan:
        dense = self._dense.plan(batch, shape, group=group, into=into and into.dense, recorder=recorder)
        return SparsePlan(dense, batch)

    # -- writing ------------------------------------------------------------------------------------------

    def write_rows(
        self, latent: Tensor, k_rope: Tensor, cache: SparseCache, plan: SparsePlan, layer: LatentLayer
    ) -> SparseCache:
        return SparseCache(self._dense.write_rows(latent, k_rope, cache.rows, plan.dense, layer), cache.index)

    def write_index(self, keys: Tensor, cache: SparseCache, plan: SparsePlan, layer: LatentLayer) -> SparseCache:
        slots = plan.view.slot_mapping
        written = (slots >= 0).nonzero().squeeze(-1)
        cache.index.flatten(0, 1)[slots[written].long()] = keys[written].to(cache.index.dtype)
        return cache

    # -- choosing -----------------------------------------------------------------------------------------

    def choose_tokens(
        self, queries: Tensor, weights: Tensor, cache: SparseCache, plan: SparsePlan, layer: LatentLayer
    ) -> Tensor:
        chosen = queries.new_full((len(queries), self.spec.top_k), -1, dtype=torch.int32)
        for row in _rows(plan.view):
            length = row.start + row.end - row.begin
            keys = cache.index[row.blocks].flatten(0, 1)[:length].float()
            at_once = max(1, _MOST_SCORES // (length * queries.shape[1]))
            for begin in range(row.begin, row.end, at_once):
                mine = slice(begin, min(row.end, begin + at_once))
                scores = torch.einsum("qhd,kd->qhk", queries[mine].float(), keys).relu_()
                scores = torch.einsum("qhk,qh->qk", scores, weights[mine].float())
                last_seen = torch.arange(begin, begin + len(scores), device=scores.device) + row.start - row.begin
                seen = torch.arange(length, device=scores.device) <= last_seen.unsqueeze(-1)
                chosen[mine] = greatest_scores(scores, seen, self.spec.top_k)
        return chosen

    # -- attending ----------------------------------------------------------------------------------------

    def attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: SparseCache,
        plan: SparsePlan,
        layer: LatentLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        return self._dense.attend(q_nope, q_rope, cache.rows, plan.dense, layer, out=out)

    def attend_chosen(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: SparseCache,
        plan: SparsePlan,
        layer: LatentLayer,
        chosen: Tensor,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        rows = list(_rows(plan.view))
        if all(row.start + row.end - row.begin <= self.spec.top_k for row in rows):
            return self.attend(q_nope, q_rope, cache, plan, layer, out=out)  # everything was chosen
        shape = (len(q_nope), self.spec.num_heads, self.spec.v_dim)
        result = q_nope.new_zeros(shape) if out is None else out.zero_()
        for row in rows:
            held = self._dense.export_arrays(cache.rows, row.blocks.tolist())["latent"].flatten(0, 1)
            for begin in range(row.begin, row.end, max(1, _MOST_ROWS // self.spec.top_k)):
                mine = slice(begin, min(row.end, begin + max(1, _MOST_ROWS // self.spec.top_k)))
                result[mine] = self._attend_chosen(q_nope[mine], q_rope[mine], held, chosen[mine], layer)
        return result

    def _attend_chosen(
        self, q_nope: Tensor, q_rope: Tensor, held: Tensor, chosen: Tensor, layer: LatentLayer
    ) -> Tensor:
        """Queries of one sequence, whose rows are held [length, row_dim], over those at `chosen`, absorbed."""
        missing = chosen < 0
        rows = held[chosen.clamp(min=0).long()].float()  # [queries, top_k, row_dim]
        rows.masked_fill_(missing.unsqueeze(-1), 0)
        folded = torch.einsum("qhn,hnc->qhc", q_nope.float(), layer.k_up.float())
        scores = torch.cat((folded, q_rope.float()), dim=-1) @ rows.transpose(1, 2) * layer.scale  # [queries, heads, k]
        weights = scores.masked_fill_(missing.unsqueeze(1), -torch.inf).softmax(dim=-1)
        latents = weights @ rows[..., : self.spec.latent_dim]
        return torch.einsum("qhc,hvc->qhv", latents, layer.v_up.float()).to(q_nope.dtype)

    # -- blocks -------------------------------------------------------------------------------------------

    def copy_blocks(self, cache: SparseCache, src: Sequence[int], dst: Sequence[int]) -> SparseCache:
        sources, destinations = last_copies(src, dst)
        cache.index[destinations] = cache.index[sources]
        return SparseCache(self._dense.copy_blocks(cache.rows, sources, destinations), cache.index)

    def zero_blocks(self, cache: SparseCache, ids: Sequence[int]) -> SparseCache:
        cache.index[list(ids)] = 0
        return SparseCache(self._dense.zero_blocks(cache.rows, ids), cache.index)

    def export_arrays(self, cache: SparseCache, ids: Sequence[int]) -> dict[str, Tensor]:
        return {**self._dense.export_arrays(cache.rows, ids), "index": cache.index[list(ids)]}

    def import_arrays(self, cache: SparseCache, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> SparseCache:
        cache.index[list(ids)] = arrays["index"]
        rows = {name: array for name, array in arrays.items() if name != "index"}
        return SparseCache(self._dense.import_arrays(cache.rows, ids, rows), cache.index)


def dense_part(spec: LatentSpec) -> LatentSpec:
    """What the rows of a sparse spec are to a dense backend."""
    return replace(spec, index_dim=0, top_k=0)


def _index_alone(spec: LatentSpec) -> LatentSpec:
    return replace(spec, latent_dim=spec.index_dim, rope_dim=0, index_dim=0)


def _rows(view: BatchView) -> Iterator[_Row]:
    starts = view.query_start.tolist()
    for row, length in enumerate(view.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if end > begin:
            blocks = view.block_table[row, : -(-length // view.block_size)].long()
            yield _Row(begin, end, length - (end - begin), blocks)


def greatest_scores(scores: Tensor, seen: Tensor, top_k: int) -> Tensor:
    """By query, the places of the greatest scores that it sees, ascending: [queries, top_k] int32, with -1 behind the
    last. `scores` and `seen` are [queries, keys]. Of equal scores the first ones win, and NaN is the least."""
    past = scores.shape[1]
    lowest, highest = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
    scores = torch.nan_to_num(scores, lowest, highest, lowest).masked_fill(~seen, -torch.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    best = torch.where(seen.gather(1, best), best, past).sort(dim=-1).values
    best = torch.where(best == past, -1, best).int()
    missing = best.new_full((len(best), max(0, top_k - past)), -1)
    return torch.cat((best, missing), dim=-1)
