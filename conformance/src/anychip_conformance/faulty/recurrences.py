"""Faults of recurrences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anychip.ops.reference import RULES, DenseStates
from anychip.plugin_api import NULL_BLOCK, RECURRENCES, StateLayer, StateView
from anychip_conformance.faulty.registry import fault

States = dict[str, Tensor]
Given = dict[str, Tensor]


class PlainRecurrence(DenseStates):
    """A row at a time, each step a method of its own."""

    name = "plain"

    def forward(
        self, inputs: Mapping[str, Tensor], cache: States, plan: StateView, layer: StateLayer
    ) -> tuple[Tensor, States]:
        result = torch.zeros_like(inputs[RECURRENCES[self.spec.recurrence].like])
        weights = {name: weight.float() for name, weight in layer.weights.items()}
        fresh = self.fresh(plan)
        for row in range(len(plan.host_query_lens)):
            begin, end = self.tokens(plan, row)
            block = self.block(int(plan.state_blocks[row]))
            if end > begin and block != NULL_BLOCK:
                mine = {name: given[begin:end].float() for name, given in inputs.items()}
                first = {
                    name: torch.zeros_like(held[block]).float() if fresh[row] else held[block].float()
                    for name, held in cache.items()
                }
                found, after = self.advance(mine, first, weights)
                result[begin:end] = found.to(result.dtype)
                for name, held in cache.items():
                    held[block] = after[name].to(held.dtype)
        return result, cache

    def fresh(self, plan: StateView) -> Tensor:
        return plan.is_fresh()

    def tokens(self, plan: StateView, row: int) -> tuple[int, int]:
        return int(plan.query_start[row]), int(plan.query_start[row + 1])

    def block(self, block: int) -> int:
        return block

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        return RULES[self.spec.recurrence].chunk(inputs, first, weights)

    def is_of(self, *recurrences: str) -> bool:
        return self.spec.recurrence in recurrences


@fault("recurrence-not-reset", "recurrence", killed_by="state.recurrence_fresh.004")
class NotReset(PlainRecurrence):
    """A sequence at its first token starts from what its block holds."""

    def fresh(self, plan: StateView) -> Tensor:
        return torch.zeros_like(super().fresh(plan))


@fault("recurrence-tail-lost-at-a-chunk", "recurrence", killed_by="state.recurrence_chunks.006")
class TailLost(PlainRecurrence):
    """A convolution over several tokens sees none before them."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        if self.is_of("causal_conv") and len(inputs["x"]) > 1:
            first = {"tail": torch.zeros_like(first["tail"])}
        return super().advance(inputs, first, weights)


@fault("recurrence-tail-of-a-short-chunk", "recurrence", killed_by="state.recurrence_chunks.005")
class TailOfShortChunk(PlainRecurrence):
    """After a chunk shorter than the tail, the tail has the chunk's inputs alone, and zeros."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        found, after = super().advance(inputs, first, weights)
        if self.is_of("causal_conv") and len(inputs["x"]) < len(after["tail"]):
            after["tail"][: -len(inputs["x"])] = 0
        return found, after


@fault("recurrence-tail-newest-first", "recurrence", killed_by="state.recurrence.005")
class TailNewestFirst(PlainRecurrence):
    """The tail is kept and read in the wrong order."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        if not self.is_of("causal_conv"):
            return super().advance(inputs, first, weights)
        found, after = super().advance(inputs, {"tail": first["tail"].flip(0)}, weights)
        return found, {"tail": after["tail"].flip(0)}


@fault("recurrence-decay-in-bfloat16", "recurrence", killed_by="state.recurrence.013")
class NarrowDecay(PlainRecurrence):
    """Steps and decays lose their last bits before the exponential."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        narrow = {name: x.bfloat16().float() if name in ("dt", "g") else x for name, x in inputs.items()}
        return super().advance(narrow, first, weights)


@fault("recurrence-fork-shares-its-state", "recurrence", killed_by="state.fork.004")
class SharedByFork(PlainRecurrence):
    """A copy of a block is the block itself from then on."""

    of: dict[int, int]

    def copy_blocks(self, cache: States, src: Sequence[int], dst: Sequence[int]) -> States:
        self.of = dict(zip(dst, src, strict=True))
        return super().copy_blocks(cache, src, dst)

    def block(self, block: int) -> int:
        return getattr(self, "of", {}).get(block, block)

    def export_arrays(self, cache: States, ids: Sequence[int]) -> dict[str, Tensor]:
        return super().export_arrays(cache, [self.block(block) for block in ids])


@fault("recurrence-padding-advances", "recurrence", killed_by="state.recurrence.014")
class PaddingAdvances(PlainRecurrence):
    """The last row takes in the padded tokens as well."""

    def tokens(self, plan: StateView, row: int) -> tuple[int, int]:
        begin, end = super().tokens(plan, row)
        return begin, plan.num_tokens if row == len(plan.host_query_lens) - 1 else end


@fault("recurrence-groups-in-turns", "recurrence", killed_by="state.recurrence.013")
class GroupsInTurns(PlainRecurrence):
    """Heads take the groups' vectors in turns instead of by neighbours."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        if not self.is_of("ssd"):
            return super().advance(inputs, first, weights)
        count = inputs["x"].shape[1] // inputs["b"].shape[1]
        turned = {name: inputs[name].repeat(1, count, 1) for name in ("b", "c")}
        return super().advance(inputs | turned, first, weights)


@fault("recurrence-skip-left-out", "recurrence", killed_by="state.recurrence.009")
class SkipLeftOut(PlainRecurrence):
    """The token's own input is not added to what is read."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        if "d" in weights:
            weights = weights | {"d": torch.zeros_like(weights["d"])}
        return super().advance(inputs, first, weights)


@fault("recurrence-keys-not-normed", "recurrence", killed_by="state.recurrence.017")
class KeysNotNormed(PlainRecurrence):
    """The delta rule writes with keys as long as they come."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        if not self.is_of("gated_delta", "kda"):
            return super().advance(inputs, first, weights)
        length = inputs["k"].square().sum(dim=-1, keepdim=True).sqrt()
        if self.is_of("gated_delta"):
            length = length.repeat_interleave(inputs["v"].shape[1] // inputs["k"].shape[1], dim=1)
        return super().advance(inputs | {"beta": inputs["beta"] * length.squeeze(-1)}, first, weights)


@fault("recurrence-reads-before-it-decays", "recurrence", killed_by="state.recurrence.017")
class ReadsUndecayed(PlainRecurrence):
    """The delta rule corrects by what the key read before the state decayed."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        if not self.is_of("gated_delta"):
            return super().advance(inputs, first, weights)
        terms = RULES["gated_delta"].terms(inputs)  # type: ignore[attr-defined]
        general = {name: getattr(terms, name) for name in ("q", "k", "v", "a")}
        keys = terms.g.expand_as(terms.k)
        return RULES["wkv7"].chunk(general | {"g": keys, "b": terms.b / terms.g.exp()}, first, weights)


@fault("recurrence-forgets-within-a-row", "recurrence", killed_by="state.recurrence.016")
class ForgetsWithin(PlainRecurrence):
    """A long row is computed in pieces, and each begins from nothing."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        size, outputs, after = 64, [], first
        for start in range(0, len(next(iter(inputs.values()))), size):
            mine = {name: given[start : start + size] for name, given in inputs.items()}
            before = first if not start else {name: torch.zeros_like(held) for name, held in first.items()}
            found, after = super().advance(mine, before, weights)
            outputs.append(found)
        return torch.cat(outputs), after


@fault("recurrence-kept-in-bfloat16", "recurrence", killed_by="state.recurrence.013")
class KeptNarrow(PlainRecurrence):
    """States lose their last bits between steps."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        found, after = super().advance(inputs, first, weights)
        return found, {name: held.bfloat16().float() for name, held in after.items()}


@fault("recurrence-slope-of-another-sign", "recurrence", killed_by="state.recurrence.025")
class SlopeGrows(PlainRecurrence):
    """Heads of lightning attention remember more of what is longer ago."""

    def advance(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        if "slope" in weights:
            weights = weights | {"slope": -weights["slope"]}
        return super().advance(inputs, first, weights)
