"""Reference state layers: plain storage for any state, and the recurrences, one sequence at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anychip.plugin_api import NULL_BLOCK, StateBackend, StateLayer, StateSpec, StateView, Unsupported

_ALIGN = 64

States = dict[str, Tensor]
"""By array of the spec: [num_blocks, *shape]."""


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
        for held in cache.values():
            held[list(dst)] = held[list(src)]
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


class GatedSum(DenseStates):
    """The recurrence gated_sum: a token by itself where a row has one, and all of a longer chunk at once."""

    name = "reference"

    def forward(
        self, inputs: Mapping[str, Tensor], cache: States, plan: StateView, layer: StateLayer
    ) -> tuple[Tensor, States]:
        x, gate, sums = inputs["x"], inputs["gate"], cache["sum"]
        result = torch.zeros_like(x)
        starts, fresh = plan.query_start.tolist(), plan.is_fresh().tolist()
        for row, block in enumerate(plan.state_blocks.tolist()):
            begin, end = starts[row], starts[row + 1]
            if end == begin or block == NULL_BLOCK:
                continue
            first = torch.zeros_like(sums[block]) if fresh[row] else sums[block]
            advance = gated_sum_recurrent if end - begin == 1 else gated_sum_chunked
            found = advance(x[begin:end].float(), gate[begin:end].float(), first)
            result[begin:end] = found.to(x.dtype)
            sums[block] = found[-1]
        return result, cache


def gated_sum_recurrent(x: Tensor, gate: Tensor, first: Tensor) -> Tensor:
    """The sums after each token [num_tokens, *shape], from the sum `first` [*shape] before them; all float32."""
    sums, last = [], first
    for added, kept in zip(x, gate, strict=True):
        last = kept * last + added
        sums.append(last)
    return torch.stack(sums)


def gated_sum_chunked(x: Tensor, gate: Tensor, first: Tensor) -> Tensor:
    """As gated_sum_recurrent, in as many rounds as the logarithm of the number of tokens: after a round that looks back
    `reach` tokens, each place holds what the last 2 * `reach` tokens make of any sum before them."""
    added, kept = x.clone(), gate.clone()
    added[0] += kept[0] * first
    reach = 1
    while reach < len(x):
        more, before = added[:-reach].clone(), kept[:-reach].clone()
        added[reach:] += kept[reach:] * more
        kept[reach:] = kept[reach:] * before
        reach *= 2
    return added


_RECURRENCES: dict[str, type[StateBackend]] = {"gated_sum": GatedSum}


def reference_state(spec: StateSpec) -> StateBackend:
    """Raises Unsupported for a recurrence that has no reference."""
    if spec.recurrence not in _RECURRENCES:
        raise Unsupported("state backend reference", [f"has no recurrence {spec.recurrence}"])
    return _RECURRENCES[spec.recurrence](spec)
