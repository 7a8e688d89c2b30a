"""Faults of step programs that are right up to a size, and wrong beyond it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from anychip.plugin_api import SamplingInputs, StepInputs
from anychip_conformance.fakes.static import DonatedState, StaticHidden, StaticStepProgram
from anychip_conformance.faulty.registry import fault

_VOCABULARY, _STEPS, _ROWS = "step.reach_vocabulary.001", "step.reach_steps.001", "step.reach_rows.001"


@fault("step-last-ids-in-16-bits", "step", killed_by=_VOCABULARY)
class LastIdsIn16Bits(StaticStepProgram):
    """A drawn id that the next step reads on the device is cut to 16 bits."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        state, results = super().sample(state, hidden, late)
        held = state.take()
        return DonatedState(replace(held, last_ids=held.last_ids & 0xFFFF)), results


@fault("step-inputs-in-16-bits", "step", killed_by=_VOCABULARY)
class InputsIn16Bits(StaticStepProgram):
    """Ids of a prompt are cut to 16 bits."""

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        ids = inputs.input_ids
        ids[ids > 0] &= 0xFFFF
        return super().forward(state, inputs)


@fault("step-masks-of-32768-ids", "step", killed_by=_VOCABULARY)
class MasksOf32768Ids(StaticStepProgram):
    """Tokens past 32,768 escape the mask."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        if late.masks is not None:
            late.masks[:, 1024:] = -1
        return super().sample(state, hidden, late)


@fault("step-256th-sees-the-last-ids", "step", killed_by=_STEPS)
class Step256(StaticStepProgram):
    """Steps are numbered in a byte: the 256th reads the ids of two steps before."""

    _count = 0
    _older: torch.Tensor | None = None

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        self._count += 1
        held = state.take()
        older, self._older = self._older, held.last_ids.clone()
        given = held.last_ids if older is None or self._count % 256 else older
        return super().forward(DonatedState(replace(held, last_ids=given)), inputs)


@fault("step-context-past-128", "step", killed_by=_STEPS)
class ContextPast128(StaticStepProgram):
    """A row's block table is read from its beginning again behind 128 tokens."""

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        for group, size in enumerate(self.kv.block_sizes):
            table = inputs.block_tables[group]
            most = max(1, 128 // size)
            for page in range(most, table.shape[1]):
                table[:, page] = table[:, page % most]
        return super().forward(state, inputs)


@fault("step-slots-past-8", "step", killed_by=_ROWS)
class SlotsPast8(StaticStepProgram):
    """The last id of a slot past the eighth is kept for the slot 8 before."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        return super().sample(state, replace(hidden, slots=hidden.slots % 8), late)
