"""State layers without a look at the host: all rows of a step at once, and a new cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.plugin_api import Recorder, ShapeKey, StateBackend, StateLayer, StateView
from anychip.plugin_api.plan import Plan


@dataclass(frozen=True, slots=True)
class FunctionalStatePlan:
    row: Tensor  # [num_tokens] of each token
    begins: Tensor  # [num_tokens] bool: its row's first
    valid: Tensor  # [num_tokens] bool: no padding
    fresh: Tensor  # [num_reqs] bool: rows at their first token
    blocks: Tensor  # [num_reqs]
    last: Tensor  # [num_reqs] the row's last token
    has_tokens: Tensor  # [num_reqs] bool


def functional_state_plan(starts: Tensor, lengths: Tensor, blocks: Tensor, num_tokens: int) -> FunctionalStatePlan:
    """starts [num_reqs + 1], lengths [num_reqs], blocks [num_reqs]."""
    tokens, counts = torch.arange(num_tokens, device=starts.device), starts[1:] - starts[:-1]
    row = torch.searchsorted(starts[1:].contiguous(), tokens.int(), right=True).clamp(max=len(lengths) - 1)
    return FunctionalStatePlan(
        row=row,
        begins=tokens == starts[row],
        valid=tokens < starts[-1],
        fresh=lengths == counts,
        blocks=blocks.long(),
        last=(starts[1:].long() - 1).clamp(min=0),
        has_tokens=counts > 0,
    )


class FunctionalStates(StateBackend):
    """The gated sum. One scan serves every row: at a row's first token the gate is closed to what stands before it in
    the step, and the row's own state is let in instead. The cache is [num_blocks, *shape] float32."""

    name = "functional"

    def make_cache(self, raw: Tensor, num_blocks: int) -> Tensor:
        return raw.view(torch.float32).view(num_blocks, *self.spec.arrays[0].shape)

    def plan(
        self,
        view: StateView,
        shape: ShapeKey,
        *,
        group: int,
        into: Plan | None = None,
        recorder: Recorder | None = None,
    ) -> FunctionalStatePlan:
        return functional_state_plan(view.query_start, view.seq_lens, view.state_blocks, view.num_tokens)

    def forward(
        self, inputs: Mapping[str, Tensor], cache: Tensor, plan: FunctionalStatePlan, layer: StateLayer
    ) -> tuple[Tensor, Tensor]:
        x, gate = inputs["x"].float(), inputs["gate"].float()
        held = cache[plan.blocks]  # [num_reqs, *shape]
        first = torch.where(_as(plan.fresh, held), 0.0, held)[plan.row]
        begins = _as(plan.begins, x)
        added = torch.where(begins, x + gate * first, x)
        kept = torch.where(begins, 0.0, gate)
        reach = 1
        while reach < len(x):
            earlier, passed = torch.zeros_like(added), torch.ones_like(kept)
            earlier[reach:], passed[reach:] = added[:-reach], kept[:-reach]
            added, kept = added + kept * earlier, kept * passed
            reach *= 2
        after = torch.where(_as(plan.has_tokens, held), added[plan.last], held)
        result = torch.where(_as(plan.valid, x), added, 0.0).to(inputs["x"].dtype)
        return result, cache.index_copy(0, plan.blocks, after)

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        return cache.index_copy(0, torch.tensor(list(dst)), cache[list(src)])

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return cache.index_fill(0, torch.tensor(list(ids)), 0.0)

    def export_arrays(self, cache: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
        return {self.spec.arrays[0].name: cache[list(ids)]}

    def import_arrays(self, cache: Tensor, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> Tensor:
        return cache.index_copy(0, torch.tensor(list(ids)), arrays[self.spec.arrays[0].name])


def _as(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of rows or tokens, for arrays that have more dimensions."""
    return mask.view(-1, *[1] * (like.dim() - 1))
