"""Reference state layers: plain storage for any state, and every recurrence over it. Rows of one token advance all at
once in recurrent form, and a row of more tokens by itself in chunked form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference.block_moves import last_copies
from anychip.ops.reference.delta_rules import GatedDelta, Kda, Wkv7
from anychip.ops.reference.scans import CausalConv, GatedSum, Lightning, SelectiveScan, Ssd
from anychip.ops.reference.state_rules import Rule, States
from anychip.plugin_api import RECURRENCES, Recorder, ShapeKey, StateBackend, StateLayer, StateSpec, StateView

_ALIGN = 64
RULES: Mapping[str, Rule] = {
    "gated_sum": GatedSum(),
    "causal_conv": CausalConv(),
    "selective_scan": SelectiveScan(),
    "ssd": Ssd(),
    "gated_delta": GatedDelta(),
    "kda": Kda(),
    "lightning": Lightning(),
    "wkv7": Wkv7(),
}
"""By recurrence."""
assert RULES.keys() == RECURRENCES.keys()


class DenseStates(StateBackend):
    """Storage: each of the spec's arrays lies whole, for all blocks, behind the one before it."""

    def state_bytes(self) -> int:
        return sum(-(-array.nbytes // _ALIGN) * _ALIGN for array in self.spec.arrays)

    def make_cache(self, raw: Tensor, num_blocks: int) -> States:
        states, offset = States(), 0
        for array in self.spec.arrays:
            held = raw[offset : offset + num_blocks * array.nbytes]
            states[array.name] = held.view(getattr(torch, array.dtype)).view(num_blocks, *array.shape)
            offset += num_blocks * (-(-array.nbytes // _ALIGN) * _ALIGN)
        return states

    def copy_blocks(self, cache: States, src: Sequence[int], dst: Sequence[int]) -> States:
        sources, destinations = last_copies(src, dst)
        for held in cache.values():
            held[destinations] = held[sources]
        return cache

    def zero_blocks(self, cache: States, ids: Sequence[int]) -> States:
        for held in cache.values():
            held[list(ids)] = 0
        return cache

    def export_arrays(self, cache: States, ids: Sequence[int]) -> dict[str, Tensor]:
        return {name: held[list(ids)] for name, held in cache.items()}

    def import_arrays(self, cache: States, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> States:
        for name, held in cache.items():
            held[list(ids)] = arrays[name]
        return cache


@dataclass(frozen=True, slots=True)
class StateRow:
    """A row of several tokens."""

    tokens: slice
    block: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class RowPlan:
    """A step's rows by how they are computed. The rows of one token: their tokens, blocks and whether each is its
    sequence's first, [rows] all; then the longer rows."""

    tokens: Tensor
    blocks: Tensor
    fresh: Tensor
    longer: tuple[StateRow, ...]


def row_plan(view: StateView) -> RowPlan:
    counts = view.host_query_lens
    starts = np.cumsum(counts) - counts
    device, is_fresh = view.state_blocks.device, view.is_fresh()
    ones, more = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1).tolist()
    rows = torch.from_numpy(ones).to(device)
    blocks, fresh = (view.state_blocks.tolist(), is_fresh.tolist()) if more else ([], [])
    return RowPlan(
        tokens=torch.from_numpy(starts[ones]).to(device).long(),
        blocks=view.state_blocks[rows].long(),
        fresh=is_fresh[rows],
        longer=tuple(
            StateRow(slice(int(starts[row]), int(starts[row] + counts[row])), blocks[row], fresh[row]) for row in more
        ),
    )


class ReferenceStates(DenseStates):
    """Any recurrence, by its rule."""

    name = "reference"

    def __init__(self, spec: StateSpec) -> None:
        super().__init__(spec)
        self.rule = RULES[spec.recurrence]
        self.like = RECURRENCES[spec.recurrence].like

    def plan(
        self,
        view: StateView,
        shape: ShapeKey,
        *,
        group: int,
        into: RowPlan | None = None,
        recorder: Recorder | None = None,
    ) -> RowPlan:
        return row_plan(view)

    def forward(
        self, inputs: Mapping[str, Tensor], cache: States, plan: RowPlan, layer: StateLayer
    ) -> tuple[Tensor, States]:
        result = torch.zeros_like(inputs[self.like], memory_format=torch.contiguous_format)
        weights = {name: weight.float() for name, weight in layer.weights.items()}
        if len(plan.tokens):
            mine = {name: given[plan.tokens].float() for name, given in inputs.items()}
            found, after = self.rule.step(mine, self._before(cache, plan.blocks, plan.fresh), weights)
            result[plan.tokens] = found.to(result.dtype)
            for name, held in cache.items():
                held[plan.blocks] = after[name].to(held.dtype)
        for row in plan.longer:
            mine = {name: given[row.tokens].float() for name, given in inputs.items()}
            first = {
                name: torch.zeros_like(held[row.block], dtype=torch.float32) if row.fresh else held[row.block].float()
                for name, held in cache.items()
            }
            found, after = self.rule.chunk(mine, first, weights)
            result[row.tokens] = found.to(result.dtype)
            for name, held in cache.items():
                held[row.block] = after[name].to(held.dtype)
        return result, cache

    @staticmethod
    def _before(cache: States, blocks: Tensor, fresh: Tensor) -> States:
        """The states of rows before their token, float32: zeros where it is the first."""
        before = {name: held[blocks].float() for name, held in cache.items()}
        return {name: held.masked_fill(fresh.view(-1, *[1] * (held.dim() - 1)), 0.0) for name, held in before.items()}


def reference_state(spec: StateSpec) -> StateBackend:
    return ReferenceStates(spec)
