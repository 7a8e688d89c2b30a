"""Faults of latent attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import ReferenceLatent
from anychip.plugin_api import BatchView, LatentLayer, Rope
from anychip_conformance.faulty.registry import fault


@fault("latent-next-slot", "latent", killed_by="latent.attend.001")
class NextSlot(ReferenceLatent):
    """A row is written one slot behind its own."""

    def write_rows(self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: BatchView, layer: LatentLayer) -> Tensor:
        slots = torch.where(plan.slot_mapping >= 0, plan.slot_mapping + 1, plan.slot_mapping)
        return super().write_rows(latent, k_rope, cache, dataclasses.replace(plan, slot_mapping=slots), layer)


@fault("latent-offset-for-slot", "latent", killed_by="latent.attend.003")
class OffsetForSlot(ReferenceLatent):
    """Rows are written to their place within a block, all into one block."""

    def write_rows(self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: BatchView, layer: LatentLayer) -> Tensor:
        slots = torch.where(plan.slot_mapping >= 0, plan.slot_mapping % plan.block_size, plan.slot_mapping)
        return super().write_rows(latent, k_rope, cache, dataclasses.replace(plan, slot_mapping=slots), layer)


@fault("latent-padding-slot-written", "latent", killed_by="latent.attend.005")
class PaddingSlotWritten(ReferenceLatent):
    """Slot -1 is an index like others: the pool's last row."""

    def write_rows(self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: BatchView, layer: LatentLayer) -> Tensor:
        slots = plan.slot_mapping % cache.flatten(0, 1).shape[0]
        return super().write_rows(latent, k_rope, cache, dataclasses.replace(plan, slot_mapping=slots), layer)


@fault("latent-halves-swapped", "latent", killed_by="latent.attend.001")
class HalvesSwapped(ReferenceLatent):
    """The rotated values come first in a row."""

    def write_rows(self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: BatchView, layer: LatentLayer) -> Tensor:
        row = torch.cat((k_rope, latent), dim=-1)
        latent, k_rope = row.tensor_split([self.spec.latent_dim], dim=-1)
        return super().write_rows(latent, k_rope, cache, plan, layer)


@fault("latent-key-not-rotated", "latent", killed_by="latent.attend.004")
class KeyNotRotated(ReferenceLatent):
    """The shared key is written without its position."""

    def forward(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, cache: Any, plan: Any,
        layer: LatentLayer, *, rope: Rope | None = None, out: Tensor | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        if rope is not None:
            q_rope = layer.ops.rotary(x=q_rope, positions=plan.positions, rope=rope)
        return super().forward(q_nope, q_rope, latent, k_rope, cache, plan, layer, out=out)


@fault("latent-no-rotated-score", "latent", killed_by="latent.attend.001")
class NoRotatedScore(ReferenceLatent):
    """Scores leave the rotated part out."""

    def _attend_row(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, layer: LatentLayer) -> Tensor:
        return super()._attend_row(q_nope, torch.zeros_like(q_rope), rows, layer)


@fault("latent-scale-of-nope-alone", "latent", killed_by="latent.attend.001")
class ScaleOfNopeAlone(ReferenceLatent):
    """Scores are divided by the root of the part that is not rotated."""

    def _attend_row(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, layer: LatentLayer) -> Tensor:
        other = dataclasses.replace(layer, scale=self.spec.nope_dim**-0.5)
        return super()._attend_row(q_nope, q_rope, rows, other)


@fault("latent-first-heads-values", "latent", killed_by="latent.attend.001")
class FirstHeadsValues(ReferenceLatent):
    """All heads take the first one's values."""

    def _attend_row(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, layer: LatentLayer) -> Tensor:
        other = dataclasses.replace(layer, v_up=layer.v_up[:1].expand_as(layer.v_up))
        return super()._attend_row(q_nope, q_rope, rows, other)


@fault("latent-window-ignored", "latent", killed_by="latent.attend.007")
class WindowIgnored(ReferenceLatent):
    """Queries see what their window has passed."""

    def _attend_row(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, layer: LatentLayer) -> Tensor:
        honest, self.spec = self.spec, dataclasses.replace(self.spec, window=None)
        try:
            return super()._attend_row(q_nope, q_rope, rows, layer)
        finally:
            self.spec = honest


@fault("latent-first-rows-blocks", "latent", killed_by="latent.attend.001")
class FirstRowsBlocks(ReferenceLatent):
    """Every row attends over the first row's blocks."""

    def attend(
        self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, plan: BatchView, layer: LatentLayer,
        *, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        table = plan.block_table[:1].expand_as(plan.block_table)
        return super().attend(q_nope, q_rope, cache, dataclasses.replace(plan, block_table=table), layer, out=out)


@fault("latent-export-loses-a-row", "latent", killed_by="latent.export_import.001")
class ExportLosesARow(ReferenceLatent):
    """The last row of an exported block is that before it."""

    def export_arrays(self, cache: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
        rows = super().export_arrays(cache, ids)["latent"].clone()
        rows[:, -1] = rows[:, -2]
        return {"latent": rows}


@fault("latent-import-sorted", "latent", killed_by="latent.export_import.001")
class ImportSorted(ReferenceLatent):
    """Blocks go in by the order of their ids instead of the caller's."""

    def import_arrays(self, cache: Tensor, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> Tensor:
        return super().import_arrays(cache, sorted(ids), arrays)


@fault("latent-copy-without-rotated", "latent", killed_by="latent.copy_blocks.001")
class CopyWithoutRotated(ReferenceLatent):
    """A copied block keeps its old rotated values."""

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        cache[list(dst), :, : self.spec.latent_dim] = cache[list(src), :, : self.spec.latent_dim]
        return cache


@fault("latent-zero-first-only", "latent", killed_by="latent.zero_blocks.001")
class ZeroFirstOnly(ReferenceLatent):
    """One block is zeroed of those asked for."""

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return super().zero_blocks(cache, list(ids)[:1])
