"""Faults of adapters: in the op, in a step program's slots, and in one rank's share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import add_low_rank
from anychip.plugin_api import AdapterEntry, AdapterStack, LowRank, Platform, StepInputs
from anychip_conformance.fakes.static import DonatedState, StaticStepProgram
from anychip_conformance.faulty.registry import fault
from anychip_conformance.faulty.step_extras import InputsFault

_FIRST = "op.add_low_rank.001"


@fault("adapter-of-the-next-slot", "op", op="add_low_rank", killed_by=_FIRST)
def next_slot(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """A token gets the adapter of the slot behind its own."""
    turned = torch.where(slots < 0, slots, (slots + 1) % len(stack.down))
    return add_low_rank(x=x, y=y, stack=stack, slots=turned)


@fault("adapter-of-the-first-token", "op", op="add_low_rank", killed_by=_FIRST)
def slot_of_the_first_token(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """All tokens with adapters get the first token's."""
    return add_low_rank(x=x, y=y, stack=stack, slots=torch.where(slots < 0, slots, slots[0]))


@fault("adapter-scale-forgotten", "op", op="add_low_rank", killed_by=_FIRST)
def scale_forgotten(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """The change is added as if every scale were 1."""
    return add_low_rank(x=x, y=y, stack=replace(stack, scales=torch.ones_like(stack.scales)), slots=slots)


@fault("adapter-scale-of-the-first-part", "op", op="add_low_rank", killed_by=_FIRST)
def scale_of_the_first_part(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """All parts of a product are scaled as the first."""
    scales = stack.scales[:, :1].expand_as(stack.scales)
    return add_low_rank(x=x, y=y, stack=replace(stack, scales=scales), slots=slots)


@fault("adapter-where-there-is-none", "op", op="add_low_rank", killed_by=_FIRST)
def none_row_changed(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """A token without an adapter gets the last slot's: a negative index counts from the end."""
    return add_low_rank(x=x, y=y, stack=stack, slots=slots % len(stack.down))


@fault("adapter-rank-cut", "op", op="add_low_rank", killed_by=_FIRST)
def rank_cut(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """Ranks above eight are cut."""
    return add_low_rank(x=x, y=y, stack=replace(stack, down=stack.down[:, :, :8], up=stack.up[:, :8]), slots=slots)


@fault("adapter-rank-of-the-first-part", "op", op="add_low_rank", killed_by=_FIRST)
def rank_of_the_first_part(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """An adapter that leaves the first part of a product as it is leaves all of it."""
    untouched = (stack.ranks[:, 0] == 0).view(-1, 1)
    scales = torch.where(untouched, 0.0, stack.scales)
    return add_low_rank(x=x, y=y, stack=replace(stack, scales=scales), slots=slots)


@fault("adapter-parts-share-a", "op", op="add_low_rank", killed_by=_FIRST)
def parts_share_a(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """All parts of a product read the first one's matrix A."""
    return add_low_rank(x=x, y=y, stack=replace(stack, down=stack.down[:, :1].expand_as(stack.down)), slots=slots)


@fault("adapter-in-place-of-the-product", "op", op="add_low_rank", killed_by=_FIRST)
def in_place_of_the_product(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """A token with an adapter loses what the product gave."""
    kept = torch.where((slots < 0).unsqueeze(-1), y, torch.zeros_like(y))
    return add_low_rank(x=x, y=kept, stack=stack, slots=slots)


@fault("adapter-twice", "op", op="add_low_rank", killed_by=_FIRST)
def twice(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """The change is added twice."""
    return add_low_rank(x=x, y=add_low_rank(x=x, y=y, stack=stack, slots=slots), stack=stack, slots=slots)


@fault("adapter-inner-sum-rounded", "op", op="add_low_rank", killed_by=_FIRST)
def inner_rounded(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """What passes between the two products is rounded to bfloat16."""
    for slot in range(len(stack.down)):
        for part, (begin, end) in enumerate(zip(stack.offsets, stack.offsets[1:], strict=False)):
            inner = (x.float() @ stack.down[slot, part].float().T).bfloat16().float()
            change = stack.scales[slot, part] * (inner @ stack.up[slot, :, begin:end].float())
            mine = (slots == slot).unsqueeze(-1)
            y = y.clone()
            y[:, begin:end] = torch.where(mine, (y[:, begin:end].float() + change).to(y.dtype), y[:, begin:end])
    return y


# -- slots of a step program --------------------------------------------------------------------------------------


@fault("step-adapters-late", "step", killed_by="step.adapters.001")
class AdaptersLate(StaticStepProgram):
    """Slots are filled behind the step that reads them first."""

    def adapt(self, state: DonatedState, entries: Sequence[AdapterEntry]) -> DonatedState:
        self._waiting = list(entries)
        return state

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        waiting = self.__dict__.pop("_waiting", [])
        state, hidden = super().forward(state, inputs)
        return (super().adapt(state, waiting) if waiting else state), hidden


@fault("step-adapters-stay", "step", killed_by="step.adapters.001")
class AdaptersStay(StaticStepProgram):
    """A slot keeps the adapter that it was first given."""

    def adapt(self, state: DonatedState, entries: Sequence[AdapterEntry]) -> DonatedState:
        written = self.__dict__.setdefault("_written", set())
        fresh = [entry for entry in entries if entry.slot not in written]
        written |= {entry.slot for entry in entries}
        return super().adapt(state, fresh)


@fault("step-adapters-leave-rests", "step", killed_by="step.adapters.001")
class AdaptersLeaveRests(StaticStepProgram):
    """Products that an adapter leaves as they are keep the slot's last one."""

    def adapt(self, state: DonatedState, entries: Sequence[AdapterEntry]) -> DonatedState:
        held: dict[int, dict[str, LowRank]] = self.__dict__.setdefault("_modules", {})
        for entry in entries:
            held[entry.slot] = {**held.get(entry.slot, {}), **entry.modules}
        return super().adapt(state, [AdapterEntry(entry.slot, held[entry.slot]) for entry in entries])


class SlotsFault(InputsFault):
    """A fault gives tokens other slots."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.adapter_slots is not None:
            self.choose(inputs.adapter_slots, inputs)

    def choose(self, slots: np.ndarray, inputs: StepInputs) -> None:
        raise NotImplementedError


@fault("step-adapters-one-token-late", "step", killed_by="step.adapters.001")
class OneTokenLate(SlotsFault):
    """A token has the adapter of the token before it."""

    def choose(self, slots: np.ndarray, inputs: StepInputs) -> None:
        slots[:] = np.roll(slots, 1)


@fault("step-adapters-in-prompts-alone", "step", killed_by="step.adapters.001")
class InPromptsAlone(SlotsFault):
    """Rows of one token have no adapters."""

    def choose(self, slots: np.ndarray, inputs: StepInputs) -> None:
        starts = inputs.query_start[: inputs.num_rows]
        slots[starts[np.diff(inputs.query_start[: inputs.num_rows + 1]) == 1]] = -1


@fault("step-adapters-for-all", "step", killed_by="step.adapters.001")
class ForAll(SlotsFault):
    """In a step with adapters, a row without one gets the first slot's."""

    def choose(self, slots: np.ndarray, inputs: StepInputs) -> None:
        np.maximum(slots, 0, out=slots)


# -- ranks --------------------------------------------------------------------------------------------------------


def _on_later_ranks(platform: Platform, change: Callable[[AdapterStack], AdapterStack]) -> Callable[..., Tensor]:
    first = platform.context.device_indexes[0] == 0

    def added(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
        return add_low_rank(x=x, y=y, stack=stack if first else change(stack), slots=slots)

    return added


@fault("adapter-on-the-first-rank-alone", "op of a rank", op="add_low_rank", killed_by="e2e.adapters_of_ranks.001")
def first_rank_alone(platform: Platform) -> Callable[..., Tensor]:
    """Ranks beyond the first add nothing."""
    return _on_later_ranks(platform, lambda stack: replace(stack, scales=torch.zeros_like(stack.scales)))


@fault("adapter-shard-turned", "op of a rank", op="add_low_rank", killed_by="e2e.adapters_of_ranks.001")
def shard_turned(platform: Platform) -> Callable[..., Tensor]:
    """Ranks beyond the first hold the columns of A in another order than those of their inputs."""
    return _on_later_ranks(platform, lambda stack: replace(stack, down=stack.down.roll(1, dims=-1)))
