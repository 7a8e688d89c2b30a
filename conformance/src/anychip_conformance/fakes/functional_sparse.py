"""Sparse latent attention without a look at the host: an index key stands behind each row, and a query's choice is a
mask over its row's keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anychip.ops.reference import dense_part, greatest_scores
from anychip.plugin_api import KVLayout, LatentBackend, LatentLayer, LatentSpec, latent_page_bytes
from anychip_conformance.fakes.functional import FunctionalAttention, FunctionalPlan
from anychip_conformance.fakes.functional_latents import FunctionalLatent


class FunctionalSparse(FunctionalLatent):
    """[num_blocks, block_size, row_dim + index_dim]."""

    name = "functional-sparse"

    def __init__(self, spec: LatentSpec) -> None:
        super().__init__(dense_part(spec))
        self.spec = spec

    def kv_layout(self) -> KVLayout:
        return KVLayout(block_sizes=FunctionalAttention.block_sizes, page_bytes=latent_page_bytes(self.spec))

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Tensor:
        width = self.spec.row_dim + self.spec.index_dim
        return raw.view(getattr(torch, self.spec.kv_dtype)).view(num_blocks, block_size, width)

    def write_rows(
        self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: FunctionalPlan, layer: LatentLayer
    ) -> Tensor:
        rows, index = self._parts(cache)
        return torch.cat((super().write_rows(latent, k_rope, rows, plan, layer), index), dim=-1)

    def write_index(self, keys: Tensor, cache: Tensor, plan: FunctionalPlan, layer: LatentLayer) -> Tensor:
        rows, index = self._parts(cache)
        flat = index.flatten(0, 1)  # [blocks * size, index_dim]
        target = torch.where(plan.slot_mapping >= 0, plan.slot_mapping, flat.shape[0])
        written = torch.cat((flat, flat[:1])).index_copy(0, target, keys.to(cache.dtype))[:-1]
        return torch.cat((rows, written.view(index.shape)), dim=-1)

    def choose_tokens(
        self, queries: Tensor, weights: Tensor, cache: Tensor, plan: FunctionalPlan, layer: LatentLayer
    ) -> Tensor:
        keys = self._parts(cache)[1][plan.tables].flatten(1, 2).float()  # [num_tokens, keys, index_dim]
        scores = torch.einsum("thd,tkd->thk", queries.float(), keys).relu()
        scores = torch.einsum("thk,th->tk", scores, weights.float())
        places = torch.arange(scores.shape[1], device=scores.device)
        seen = (places <= plan.last_keys.unsqueeze(-1)) & plan.valid.unsqueeze(-1)
        return greatest_scores(scores, seen, self.spec.top_k)

    def attend_chosen(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        plan: FunctionalPlan,
        layer: LatentLayer,
        chosen: Tensor,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        rows = self._parts(cache)[0][plan.tables].flatten(1, 2).float()  # [num_tokens, keys, row_dim]
        past = rows.shape[1]
        mask = torch.zeros(len(rows), past + 1, dtype=torch.bool, device=rows.device)
        mask = mask.scatter(1, torch.where(chosen < 0, past, chosen).long(), True)[:, :past]
        folded = torch.einsum("thn,hnc->thc", q_nope.float(), layer.k_up.float())
        scores = torch.cat((folded, q_rope.float()), dim=-1) @ rows.transpose(1, 2) * layer.scale
        hidden = ~mask.unsqueeze(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0)
        latents = weights @ rows[..., : self.spec.latent_dim].masked_fill(~mask.unsqueeze(-1), 0)
        return torch.einsum("thc,hvc->thv", latents, layer.v_up.float()).to(q_nope.dtype)

    def export_arrays(self, cache: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
        rows, index = self._parts(cache[list(ids)])
        return {"latent": rows, "index": index}

    def import_arrays(self, cache: Tensor, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> Tensor:
        cache[list(ids)] = torch.cat((arrays["latent"], arrays["index"]), dim=-1)
        return cache

    def _parts(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and index keys."""
        rows, index = cache.tensor_split([self.spec.row_dim], dim=-1)
        return rows, index


def functional_latent(spec: LatentSpec) -> LatentBackend:
    """The backend of a spec with index keys, or without."""
    return FunctionalSparse(spec) if spec.index_dim else FunctionalLatent(spec)
