"""Sparse latent attention in two compiled calls per layer, which may be recorded: a choice by index keys, and the
absorbed form over what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anychip.ops.reference import dense_part
from anychip.plugin_api import (
    BatchView,
    IndexInputs,
    KVLayout,
    LatentBackend,
    LatentLayer,
    LatentSpec,
    Recorder,
    Rope,
    ShapeKey,
)
from anychip_cpu.latent_kernel import KernelLatent, LatentStep, described, rotation, values_together
from anychip_cpu.native import DTYPES, Kernels, fields
from anychip_cpu.packing import round_up


@dataclass(slots=True)
class SparseCache:
    rows: Tensor  # [num_blocks, block_size, row_dim]
    index: Tensor
    """kernels/choice_types.h's pages: [num_blocks, padded_dim / 2, block_size, 2] of bfloat16, and [num_blocks,
    padded_dim, block_size, 1] of float32."""


class KernelSparse(LatentBackend):
    """Index keys lie behind all rows."""

    def __init__(self, spec: LatentSpec, kernels: Kernels, name: str) -> None:
        super().__init__(spec)
        self.name = f"cpu-{name}"
        self._kernels = kernels
        self._rows = KernelLatent(dense_part(spec), kernels, name)
        self._dtype = getattr(torch, spec.kv_dtype)
        self._padded_dim = round_up(spec.index_dim, 2)

    # -- the cache ----------------------------------------------------------------------------------------

    def kv_layout(self) -> KVLayout:
        rows = self._rows.kv_layout()
        key = self._padded_dim * self._dtype.itemsize
        return replace(rows, page_bytes=lambda size: rows.page_bytes(size) + size * key, opaque=True)

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> SparseCache:
        split = num_blocks * self._rows.kv_layout().page_bytes(block_size)
        index = raw[split:].view(self._dtype)
        together = 4 // self._dtype.itemsize
        index = index.view(num_blocks, self._padded_dim // together, block_size, together)
        return SparseCache(self._rows.make_cache(raw[:split], num_blocks, block_size), index)

    def copy_blocks(self, cache: SparseCache, src: Sequence[int], dst: Sequence[int]) -> SparseCache:
        cache.index[list(dst)] = cache.index[list(src)]
        return SparseCache(self._rows.copy_blocks(cache.rows, src, dst), cache.index)

    def zero_blocks(self, cache: SparseCache, ids: Sequence[int]) -> SparseCache:
        cache.index[list(ids)] = 0
        return SparseCache(self._rows.zero_blocks(cache.rows, ids), cache.index)

    def export_arrays(self, cache: SparseCache, ids: Sequence[int]) -> dict[str, Tensor]:
        keys = cache.index[list(ids)].transpose(1, 2).flatten(2)[..., : self.spec.index_dim]
        return {**self._rows.export_arrays(cache.rows, ids), "index": keys.contiguous()}

    def import_arrays(self, cache: SparseCache, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> SparseCache:
        # An odd dimension's neighbour is multiplied, and must be zero.
        keys = torch.nn.functional.pad(arrays["index"], (0, self._padded_dim - self.spec.index_dim))
        _, pairs, block_size, together = cache.index.shape
        cache.index[list(ids)] = keys.view(len(keys), block_size, pairs, together).transpose(1, 2)
        return SparseCache(self._rows.import_arrays(cache.rows, ids, {"latent": arrays["latent"]}), cache.index)

    # -- a step -------------------------------------------------------------------------------------------

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> LatentStep:
        return self._rows.plan(batch, shape, group=group, into=into, recorder=recorder)

    def forward(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cache: SparseCache,
        plan: LatentStep,
        layer: LatentLayer,
        *,
        rope: Rope | None = None,
        chosen: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, SparseCache]:
        if plan.rows and plan.longest <= self.spec.top_k:
            chosen = None  # everything is: prompts are faster expanded
        result, _ = self._rows.forward(
            q_nope, q_rope, latent, k_rope, cache.rows, plan, layer, rope=rope, chosen=chosen, out=out
        )
        return result, cache

    def choose(
        self, index: IndexInputs, cache: SparseCache, plan: LatentStep, layer: LatentLayer, *, rope: Rope | None = None
    ) -> tuple[Tensor, SparseCache]:
        spec = self.spec
        queries, keys, weights = (values_together(x) for x in (index.queries, index.keys, index.weights.float()))
        chosen = torch.empty((len(queries), spec.top_k), dtype=torch.int32)
        self._kernels.choose(
            fields(
                queries.shape[1], spec.index_dim, plan.block_size, spec.top_k, DTYPES[spec.dtype], *rotation(rope)
            ),
            plan.step, fields(*described(queries), *described(keys), weights.data_ptr(), weights.stride(0)),
            cache.index.data_ptr(), chosen.data_ptr(),
        )  # fmt: skip
        return chosen, cache
