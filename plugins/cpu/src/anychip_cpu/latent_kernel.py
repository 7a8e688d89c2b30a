"""Latent attention whose absorbed form is one compiled call per layer. Rows of many queries are expanded by torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import BatchView, LatentLayer, LatentSpec, Recorder, ShapeKey
from anychip_cpu.latent import CpuLatent, LatentPlan
from anychip_cpu.native import DTYPES, Kernels, fields


@dataclass(slots=True)
class KernelPlan(LatentPlan):
    step: bytes = b""
    """kernels/latent_types.h's LatentStep: the queries that attend absorbed; b"": there are none."""
    block_size: int = 0
    held: tuple[Tensor, ...] = ()
    """Keeps what the step points to alive."""


class KernelLatent(CpuLatent):
    def __init__(self, spec: LatentSpec, kernels: Kernels, name: str) -> None:
        super().__init__(spec)
        self.name = f"cpu-{name}"
        self._kernels = kernels
        self._known: tuple[LatentLayer, int, bytes] | None = None
        """What `_described` last described, and the description."""

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> KernelPlan:
        starts, lengths = batch.query_start.numpy(), batch.seq_lens.numpy()
        queries = np.diff(starts)
        short = queries > 0 if self._most_absorbed is None else (queries > 0) & (queries <= self._most_absorbed)
        counts = queries * short
        row = np.repeat(np.arange(len(queries), dtype=np.int32), counts)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its row
        written = (batch.slot_mapping >= 0).nonzero().squeeze(-1)
        plan = KernelPlan(
            positions=batch.positions,
            written=written,
            slots=batch.slot_mapping[written],
            singles=[],
            rows=[
                self._row(batch, int(starts[r]), int(starts[r + 1]), int(lengths[r]), r)
                for r in np.flatnonzero((queries > 0) & ~short).tolist()
            ],
            block_size=batch.block_size,
        )
        if len(row):
            rows = torch.from_numpy(row)
            ends = torch.from_numpy((lengths[row] - queries[row] + place + 1).astype(np.int32))
            table = batch.block_table.to(torch.int32)
            if table.stride(-1) != 1:
                table = table.contiguous()
            tokens = torch.from_numpy((starts[row] + place).astype(np.int32))
            plan.step = fields(
                tokens.data_ptr(), rows.data_ptr(), ends.data_ptr(), len(row), table.data_ptr(), table.stride(0)
            )
            plan.held = tokens, rows, ends, table
        return plan

    def attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        plan: LatentPlan,
        layer: LatentLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        result = super().attend(q_nope, q_rope, cache, plan, layer, out=out)
        assert isinstance(plan, KernelPlan)
        if plan.step:
            if q_nope.stride(2) != 1:
                q_nope = q_nope.contiguous()
            q_rope, result = q_rope.contiguous(), result.contiguous()
            self._kernels.latent_attention(
                self._described(layer, plan.block_size), plan.step, q_nope.data_ptr(), q_nope.stride(0),
                q_nope.stride(1), q_rope.data_ptr(), cache.data_ptr(), result.data_ptr(),
            )  # fmt: skip
        return result if out is None or result is out else out.copy_(result)

    def _described(self, layer: LatentLayer, block_size: int) -> bytes:
        """kernels/latent_types.h's LatentLayer, made anew when another layer's is asked for."""
        known = self._known
        if known is not None and known[0] is layer and known[1] == block_size:
            return known[2]
        spec = self.spec
        described = fields(
            spec.num_heads, spec.latent_dim, spec.row_dim, spec.nope_dim, spec.v_dim, block_size, DTYPES[spec.dtype],
            spec.window or 0, float(layer.scale), layer.k_up.data_ptr(), layer.v_up.data_ptr(),
        )  # fmt: skip
        self._known = layer, block_size, described
        return described
