"""Latent attention without a look at the host, over a new cache: its absorbed form, which is attention of all heads
over one key and value head, the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.ops.reference import ReferenceLatent, attend_gathered
from anychip.plugin_api import (
    AttentionLayer,
    AttentionSpec,
    BatchView,
    KVLayout,
    LatentLayer,
    LatentSpec,
    Recorder,
    ShapeKey,
    latent_page_bytes,
)
from anychip.plugin_api.plan import Plan
from anychip_conformance.fakes.functional import FunctionalAttention, FunctionalPlan, functional_plan


class FunctionalLatent(ReferenceLatent):
    name = "functional"

    def __init__(self, spec: LatentSpec) -> None:
        super().__init__(spec)
        self._rows = AttentionSpec(
            num_heads=spec.num_heads,
            num_kv_heads=1,
            head_dim=spec.row_dim,
            dtype=spec.dtype,
            kv_dtype=spec.kv_dtype,
            window=spec.window,
        )

    def kv_layout(self) -> KVLayout:
        return KVLayout(block_sizes=FunctionalAttention.block_sizes, page_bytes=latent_page_bytes(self.spec))

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: Plan | None = None,
        recorder: Recorder | None = None,
    ) -> FunctionalPlan:
        return functional_plan(
            batch.positions, batch.slot_mapping, batch.query_start, batch.seq_lens, batch.block_table
        )

    def write_rows(
        self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: FunctionalPlan, layer: LatentLayer
    ) -> Tensor:
        flat = cache.flatten(0, 1)  # [blocks * size, row_dim]
        # Padding goes to one row past the end, which is cut off again.
        target = torch.where(plan.slot_mapping >= 0, plan.slot_mapping, flat.shape[0])
        rows = torch.cat((latent, k_rope), dim=-1).to(cache.dtype)
        return torch.cat((flat, flat[:1])).index_copy(0, target, rows)[:-1].view(cache.shape)

    def attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        plan: FunctionalPlan,
        layer: LatentLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        folded = torch.einsum("thn,hnc->thc", q_nope.float(), layer.k_up.float())
        queries = torch.cat((folded, q_rope.float()), dim=-1)  # [num_tokens, num_heads, row_dim]
        rows = cache[plan.tables].flatten(1, 2).unsqueeze(2)  # [num_tokens, keys, 1, row_dim]
        values = rows[..., : self.spec.latent_dim]
        one = AttentionLayer(index=layer.index, scale=layer.scale, ops=layer.ops)
        attended, _ = attend_gathered(queries, rows, values, plan.last_keys, plan.valid, self._rows, one)
        return torch.einsum("thc,hvc->thv", attended, layer.v_up.float()).to(q_nope.dtype)
