"""Latent attention in one compiled call per layer, which may be recorded: rotation, the write, and the absorbed form.
Rows of many queries are expanded by torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import BatchView, LatentLayer, LatentSpec, Recorder, Rope, ShapeKey
from anychip_cpu.latent import CpuLatent, QueryRow
from anychip_cpu.native import DTYPES, Kernels, fields
from anychip_cpu.shapes import MOST_TOKENS

_ALL = 1 << 40


@dataclass(slots=True)
class LatentStep:
    """kernels/latent_types.h's LatentStep over a step's arrays: query_start, seq_lens, block_table, slots and
    positions."""

    step: bytes
    arrays: tuple[Tensor, ...]
    block_size: int
    rows: list[QueryRow]
    """Of too many queries for the absorbed form. A recorded step has none."""
    longest: int
    """Of the rows' lengths."""
    num_tokens: int
    """Of rows: behind them is padding, whose output is zeros."""

    @property
    def positions(self) -> Tensor:
        return self.arrays[4]


class KernelLatent(CpuLatent):
    def __init__(self, spec: LatentSpec, kernels: Kernels, name: str) -> None:
        super().__init__(spec)
        self.name = f"cpu-{name}"
        self._kernels = kernels
        # Whatever is recorded attends in one form: the other one is no list of kernel calls.
        self._most = _ALL if self._most_absorbed is None else max(self._most_absorbed, MOST_TOKENS)
        self._known: tuple[Any, ...] | None = None
        """What `_described` last described, and the description."""

    def plan(  # type: ignore[override]
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> LatentStep:
        # The device is the host: reading lengths here waits for nothing.
        arrays = batch.query_start, batch.seq_lens, batch.block_table, batch.slot_mapping, batch.positions
        starts, lengths = arrays[0].numpy(), arrays[1].numpy()
        longest = int(lengths.max(initial=0))
        if isinstance(into, LatentStep):
            for held, given in zip(into.arrays, arrays, strict=True):
                if held is not given:
                    held.copy_(given)
            into.num_tokens, into.longest = int(starts[-1]), longest
            return into
        arrays = tuple(
            given.to(torch.int64 if given is batch.slot_mapping else torch.int32).contiguous() for given in arrays
        )
        step = fields(
            *(array.data_ptr() for array in arrays), len(lengths), arrays[2].stride(0), batch.num_tokens
        )  # fmt: skip
        many = np.flatnonzero(np.diff(starts) > self._most).tolist()
        rows = [self._row(batch, int(starts[row]), int(starts[row + 1]), int(lengths[row]), row) for row in many]
        return LatentStep(step, arrays, batch.block_size, rows, longest, int(starts[-1]))

    def forward(  # type: ignore[override]
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cache: Tensor,
        plan: LatentStep,
        layer: LatentLayer,
        *,
        rope: Rope | None = None,
        chosen: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        shape = (len(q_nope), self.spec.num_heads, self.spec.v_dim)
        fits = out is not None and out.shape == shape and out.dtype == q_nope.dtype and out.is_contiguous()
        result = out if out is not None and fits else torch.empty(shape, dtype=q_nope.dtype)
        q_nope, q_rope, latent, k_rope = (values_together(x) for x in (q_nope, q_rope, latent, k_rope))
        top_k = 0
        if chosen is not None:
            chosen = chosen.to(torch.int32).contiguous()
            top_k = chosen.shape[1]
        inputs = fields(
            *described(q_nope), *described(q_rope), *described(latent), *described(k_rope),
            0 if chosen is None else chosen.data_ptr(), top_k,
        )  # fmt: skip
        self._kernels.latent_attention(
            self._described(layer, plan.block_size, rope), plan.step, inputs, cache.data_ptr(), result.data_ptr()
        )
        if plan.rows and chosen is None:
            if rope is not None:
                q_rope = layer.ops.rotary(x=q_rope, positions=plan.positions, rope=rope)
            for row in plan.rows:
                mine = slice(row.begin, row.end)
                held = cache[row.blocks].flatten(0, 1)[: row.start + row.end - row.begin - row.first]
                result[mine] = self._expanded(q_nope[mine], q_rope[mine], held, row, layer)
        return result, cache

    def _described(self, layer: LatentLayer, block_size: int, rope: Rope | None) -> bytes:
        """kernels/latent_types.h's LatentLayer, made anew when something in it is another object than before."""
        known = self._known
        if known is not None and known[0] is layer and known[1] == block_size and known[2] is rope:
            return bytes(known[3])
        spec = self.spec
        layout = fields(
            spec.num_heads, spec.latent_dim, spec.row_dim, spec.nope_dim, spec.v_dim, block_size, DTYPES[spec.dtype],
            spec.window or 0, float(layer.scale), layer.k_up.data_ptr(), layer.v_up.data_ptr(), self._most,
            *rotation(rope),
        )  # fmt: skip
        self._known = layer, block_size, rope, layout
        return layout


def rotation(rope: Rope | None) -> tuple[int, int, int, int]:
    """kernels/rotation.h's Rotation."""
    if rope is None:
        return 0, 0, 0, 0
    return rope.cos.data_ptr(), rope.sin.data_ptr(), rope.rotary_dim, int(rope.interleaved)


def values_together(x: Tensor) -> Tensor:
    """x, copied only where the values of its last dimension do not lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def described(x: Tensor) -> tuple[int, int, int]:
    """kernels/latent_types.h's LatentInput of [num_tokens, heads, values] or [num_tokens, values]."""
    return x.data_ptr(), x.stride(0), x.stride(1) if x.dim() == 3 else 0
