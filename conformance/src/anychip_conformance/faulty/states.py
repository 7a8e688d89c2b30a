"""Faults of state layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anychip.ops.reference import DenseStates, gated_sum_chunked
from anychip.plugin_api import NULL_BLOCK, StateLayer, StateView
from anychip_conformance.faulty.registry import fault

States = dict[str, Tensor]


class PlainStates(DenseStates):
    """The gated sum, each step a method of its own."""

    name = "plain"

    def forward(
        self, inputs: Mapping[str, Tensor], cache: States, plan: StateView, layer: StateLayer
    ) -> tuple[Tensor, States]:
        x, gate, sums = inputs["x"].float(), inputs["gate"].float(), cache["sum"]
        result = torch.zeros_like(inputs["x"])
        fresh = self.fresh(plan)
        for row in range(plan.num_reqs):
            begin, end = self.tokens(plan, row)
            block = self.block(plan, row)
            if end > begin and block != NULL_BLOCK:
                first = self.first(sums, block, bool(fresh[row]))
                found = self.advance(x[begin:end], gate[begin:end], first)
                result[begin:end] = found.to(result.dtype)
                self.keep(sums, block, found, x[begin:end], gate[begin:end])
        return result, cache

    def fresh(self, plan: StateView) -> Tensor:
        return plan.is_fresh()

    def tokens(self, plan: StateView, row: int) -> tuple[int, int]:
        return int(plan.query_start[row]), int(plan.query_start[row + 1])

    def block(self, plan: StateView, row: int) -> int:
        return int(plan.state_blocks[row])

    def first(self, sums: Tensor, block: int, fresh: bool) -> Tensor:
        return torch.zeros_like(sums[block]) if fresh else sums[block].clone()

    def advance(self, x: Tensor, gate: Tensor, first: Tensor) -> Tensor:
        return gated_sum_chunked(x, gate, first)

    def keep(self, sums: Tensor, block: int, found: Tensor, x: Tensor, gate: Tensor) -> None:
        sums[block] = found[-1]


@fault("state-stale-block", "state", killed_by="state.fresh.001")
class StaleBlock(PlainStates):
    """A sequence at its first token starts from what its block holds."""

    def fresh(self, plan: StateView) -> Tensor:
        return torch.zeros_like(super().fresh(plan))


@fault("state-fresh-by-one-token", "state", killed_by="state.advance.001")
class FreshByOneToken(PlainStates):
    """A row of one token is taken for one at its beginning."""

    def fresh(self, plan: StateView) -> Tensor:
        return super().fresh(plan) | (plan.query_start[1:] - plan.query_start[:-1] == 1)


@fault("state-of-another-row", "state", killed_by="state.advance.001")
class OfAnotherRow(PlainStates):
    """A row's state is read and kept in the block of the row before."""

    def block(self, plan: StateView, row: int) -> int:
        return int(plan.state_blocks[row - 1]) if row else int(plan.state_blocks[0])


@fault("state-by-row", "state", killed_by="state.advance.001")
class ByRow(PlainStates):
    """A row's place in the batch is taken for its block."""

    def block(self, plan: StateView, row: int) -> int:
        return row + 1 if int(plan.state_blocks[row]) != NULL_BLOCK else NULL_BLOCK


@fault("state-advanced-twice", "state", killed_by="state.advance.001")
class AdvancedTwice(PlainStates):
    """What is kept has taken in the last token once more."""

    def keep(self, sums: Tensor, block: int, found: Tensor, x: Tensor, gate: Tensor) -> None:
        sums[block] = gate[-1] * found[-1] + x[-1]


@fault("state-not-kept", "state", killed_by="state.chunks.003")
class NotKept(PlainStates):
    """What is kept is the state after the chunk's first token."""

    def keep(self, sums: Tensor, block: int, found: Tensor, x: Tensor, gate: Tensor) -> None:
        sums[block] = found[0]


@fault("state-chunk-forgets", "state", killed_by="state.advance.002")
class ChunkForgets(PlainStates):
    """A chunk of several tokens starts from zeros, wherever it begins."""

    def advance(self, x: Tensor, gate: Tensor, first: Tensor) -> Tensor:
        return super().advance(x, gate, first if len(x) == 1 else torch.zeros_like(first))


@fault("state-first-gate-left-out", "state", killed_by="state.advance.001")
class FirstGateLeftOut(PlainStates):
    """The state before a chunk is added whole, not through the first token's gate."""

    def advance(self, x: Tensor, gate: Tensor, first: Tensor) -> Tensor:
        opened = gate.clone()
        opened[0] = 1
        return super().advance(x, opened, first)


@fault("state-padding-advances", "state", killed_by="state.advance.003")
class PaddingAdvances(PlainStates):
    """The last row takes in the padded tokens as well."""

    def tokens(self, plan: StateView, row: int) -> tuple[int, int]:
        begin, end = super().tokens(plan, row)
        last = row == len(plan.host_query_lens) - 1
        return begin, plan.num_tokens if last else end


@fault("state-kept-in-bfloat16", "state", killed_by="state.advance.001")
class KeptNarrow(PlainStates):
    """States lose their last bits between steps."""

    def keep(self, sums: Tensor, block: int, found: Tensor, x: Tensor, gate: Tensor) -> None:
        sums[block] = found[-1].bfloat16().float()


@fault("state-fresh-clears-the-pool", "state", killed_by="state.advance.002")
class FreshClearsThePool(PlainStates):
    """A sequence at its first token zeroes every block instead of its own."""

    def first(self, sums: Tensor, block: int, fresh: bool) -> Tensor:
        if fresh:
            sums.zero_()
        return super().first(sums, block, fresh)


@fault("state-block-too-small", "state", killed_by="state.layout.001")
class BlockTooSmall(PlainStates):
    """A block of half the bytes that a state takes."""

    def state_bytes(self) -> int:
        return sum(array.nbytes for array in self.spec.arrays) // 2


@fault("state-copied-storage", "state", killed_by="state.shared_storage.001")
class CopiedStorage(PlainStates):
    """States that are not in the memory that core gave."""

    def make_cache(self, raw: Tensor, num_blocks: int) -> States:
        return super().make_cache(raw.clone(), num_blocks)


@fault("state-copy-reversed", "state", killed_by="state.copy_blocks.001")
class CopyReversed(PlainStates):
    """Sources become their destinations."""

    def copy_blocks(self, cache: States, src: Sequence[int], dst: Sequence[int]) -> States:
        return super().copy_blocks(cache, dst, src)


@fault("state-zero-first-only", "state", killed_by="state.zero_blocks.001")
class ZeroFirstOnly(PlainStates):
    """One block is zeroed of those asked for."""

    def zero_blocks(self, cache: States, ids: Sequence[int]) -> States:
        return super().zero_blocks(cache, list(ids)[:1])


@fault("state-export-sorted", "state", killed_by="state.export_import.001")
class ExportSorted(PlainStates):
    """States come out in the order of their ids instead of the caller's."""

    def export_arrays(self, cache: States, ids: Sequence[int]) -> dict[str, Tensor]:
        return super().export_arrays(cache, sorted(ids))


@fault("state-import-adds", "state", killed_by="state.export_import.001")
class ImportAdds(PlainStates):
    """An import is added to what the block held."""

    def import_arrays(self, cache: States, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> States:
        held = {name: cache[name][list(ids)].nan_to_num(0.0) + given for name, given in arrays.items()}
        return super().import_arrays(cache, ids, held)
