"""Faults of steps with drafts: what such a step computes, and what it draws with. What it keeps, counts and reports is
in step_drafts_results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from anychip.ops.reference.step import Drafts
from anychip.plugin_api import Ops, SamplingInputs, StepInputs
from anychip.types import PADDING_SLOT
from anychip_conformance.fakes.compiled import CompiledCall
from anychip_conformance.fakes.static import DonatedState, StaticHidden, StaticStepProgram
from anychip_conformance.faulty.registry import fault


class DraftFault(StaticStepProgram):
    """A fault of steps with drafts. `firsts` has the index of its row's first sample, by sample, padding included."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        if late.first_samples is None:
            return super().sample(state, hidden, late)
        return self.sample_drafts(state, hidden, late, late.first_samples)

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        return super().sample(state, hidden, late)


# -- what a step computes -------------------------------------------------------------------------------------


class InputsFault(StaticStepProgram):
    """A fault changes the inputs of a step with drafts. `drafted` has the indexes of the drafted tokens."""

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        if inputs.has_drafts:
            sampled, slots = inputs.logits_indices[: inputs.num_samples], inputs.sample_slots[: inputs.num_samples]
            self.change(inputs, sampled[1:][slots[1:] == slots[:-1]])
        return super().forward(state, inputs)

    def change(self, inputs: StepInputs, drafted: np.ndarray) -> None:
        raise NotImplementedError


@fault("step-drafts-not-read", "step", killed_by="step.drafts.001")
class DraftsNotRead(InputsFault):
    """The drafted tokens are not what is computed."""

    def change(self, inputs: StepInputs, drafted: np.ndarray) -> None:
        inputs.input_ids[drafted] = 7


@fault("step-drafts-repeat-the-last-token", "step", killed_by="step.drafts.001")
class RepeatTheLastToken(InputsFault):
    """In place of each draft the row's last token is computed again."""

    def change(self, inputs: StepInputs, drafted: np.ndarray) -> None:
        inputs.input_ids[drafted] = -1


@fault("step-drafts-in-the-next-row", "step", killed_by="step.drafts.001")
class InTheNextRow(InputsFault):
    """The last draft of a row is written over the first token of the row behind it as well."""

    def change(self, inputs: StepInputs, drafted: np.ndarray) -> None:
        behind = drafted[~np.isin(drafted + 1, drafted)] + 1
        behind = behind[behind < inputs.num_tokens]
        inputs.input_ids[behind] = inputs.input_ids[behind - 1]


@fault("step-drafts-hidden-state-of-the-last-token", "step", killed_by="step.drafts.001")
class HiddenStateOfTheLastToken(InputsFault):
    """Every sample of a row reads the hidden state of the row's last token."""

    def change(self, inputs: StepInputs, drafted: np.ndarray) -> None:
        for at in np.flatnonzero(np.isin(inputs.logits_indices[: inputs.num_samples], drafted))[::-1]:
            inputs.logits_indices[at - 1] = inputs.logits_indices[at]


@fault("step-drafts-at-one-place", "step", killed_by="step.drafts.001")
class AtOnePlace(InputsFault):
    """Drafted tokens turn by the position of the token before them."""

    def change(self, inputs: StepInputs, drafted: np.ndarray) -> None:
        inputs.positions[drafted] -= 1


@fault("step-drafts-not-cached", "step", killed_by="step.drafts.001")
class NotCached(InputsFault):
    """Keys and values of drafted tokens are not written."""

    def change(self, inputs: StepInputs, drafted: np.ndarray) -> None:
        for mapping in inputs.slot_mappings:
            mapping[drafted] = PADDING_SLOT


@fault("step-drafts-cached-for-good", "step", killed_by="step.drafts.001")
class CachedForGood(InputsFault):
    """Keys and values of drafts stay when their row comes to the same places again."""

    _written: np.ndarray = np.zeros(0, dtype=np.int64)

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        if not inputs.positions[: inputs.num_tokens].all():  # another request begins: the places may be its own now
            self._written = self._written[:0]
        for mapping in inputs.slot_mappings:
            mapping[np.isin(mapping, self._written)] = PADDING_SLOT
        return super().forward(state, inputs)

    def change(self, inputs: StepInputs, drafted: np.ndarray) -> None:
        places = inputs.slot_mappings[0][drafted]
        self._written = np.union1d(self._written, places[places >= 0])


@fault("step-drafts-one-hidden-state", "step", killed_by="step.drafts.001")
class OneHiddenState(DraftFault):
    """Every sample of a row draws from its first one's logits."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        logits = hidden.logits[torch.from_numpy(firsts.astype(np.int64))]
        return super().sample_drafts(state, replace(hidden, logits=logits), late, firsts)


@fault("step-drafts-slots-of-the-sample-before", "step", killed_by="step.drafts.001")
class SlotsOfTheSampleBefore(DraftFault):
    """A sample belongs to the slot of the sample before it."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        return super().sample_drafts(state, replace(hidden, slots=hidden.slots.roll(1)), late, firsts)


# -- what it draws with ---------------------------------------------------------------------------------------


class LateFault(DraftFault):
    """A fault changes what the samples of a step with drafts draw with."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        self.change(late, firsts)
        return super().sample_drafts(state, hidden, late, firsts)

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        raise NotImplementedError


@fault("step-drafts-mask-of-the-first-sample", "step", killed_by="step.drafts_masks.001")
class MaskOfTheFirstSample(LateFault):
    """The mask of a row's first sample holds for all of them."""

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        if late.masks is not None:
            late.masks[:] = late.masks[firsts]


@fault("step-drafts-mask-of-the-next-sample", "step", killed_by="step.drafts_masks.001")
class MaskOfTheNextSample(LateFault):
    """Each mask holds for the sample before its own."""

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        if late.masks is not None:
            late.masks[:] = np.roll(late.masks, -1, axis=0)


@fault("step-drafts-one-position", "step", killed_by="e2e.speculated.002")
class OnePosition(LateFault):
    """Every sample of a row is drawn with the number of its first one's position."""

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        late.position[:] = late.position[firsts]


@fault("step-drafts-position-off-by-one", "step", killed_by="e2e.speculated.002")
class PositionOffByOne(LateFault):
    """In steps with drafts, positions are those of the tokens before."""

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        late.position[:] -= 1


@fault("step-drafts-parameters-of-the-next-sample", "step", killed_by="e2e.speculated.002")
class ParametersOfTheNextSample(LateFault):
    """A row's last sample draws with the seed of the row behind it."""

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        late.seed_low[:], late.sample_index[:] = np.roll(late.seed_low, -1), np.roll(late.sample_index, -1)


def lay_out_by_row(late: SamplingInputs, firsts: np.ndarray, names: tuple[str, ...]) -> None:
    """The row's number takes the sample's place in the arrays of these names."""
    starts = np.flatnonzero(firsts[: late.num_samples] == np.arange(late.num_samples))
    for name in names:
        values = getattr(late, name)
        values[: len(starts)] = values[starts]


@fault("step-drafts-parameters-by-row", "step", killed_by="e2e.speculated.002")
class ParametersByRow(LateFault):
    """Parameters are laid out by row: the second sample of a row draws by those of the row behind."""

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        names = ("temperature", "top_k", "top_p", "min_p", "seed_low", "seed_high", "sample_index")
        lay_out_by_row(late, firsts, names)


@fault("step-drafts-edits-by-row", "step", killed_by="step.drafts_penalties.001")
class EditsByRow(LateFault):
    """Penalties and biases are those of the row that stands where the sample does."""

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "num_biases")
        lay_out_by_row(late, firsts, names)


@fault("step-drafts-biases-of-the-first-sample-alone", "step", killed_by="step.drafts_penalties.001")
class BiasesOfTheFirstSampleAlone(LateFault):
    """A row's biases are added at its first sample only."""

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        late.num_biases[firsts != np.arange(len(firsts))] = 0


@fault("step-drafts-penalties-of-the-first-sample-alone", "step", killed_by="step.drafts_penalties.001")
class PenaltiesOfTheFirstSampleAlone(LateFault):
    """A row's penalties are taken at its first sample only."""

    def change(self, late: SamplingInputs, firsts: np.ndarray) -> None:
        later = firsts != np.arange(len(firsts))
        late.repetition_penalty[later] = 1
        late.presence_penalty[later] = late.frequency_penalty[later] = 0


class SeenFault(StaticStepProgram):
    """A fault changes which drafts the edits at a sample see. Other drafts and first samples are given to what counts
    them; what is accepted is not touched."""

    def _compile(self, fn: Callable[..., object], example: tuple[object, ...]) -> CompiledCall:
        counts = Drafts.counts

        def seen(drafts: Drafts, ops: Ops, table: torch.Tensor) -> torch.Tensor:
            return counts(self.seen(drafts), ops, table)

        def faulty(*values: object) -> object:
            with patch.object(Drafts, "counts", seen):
                return fn(*values)

        return super()._compile(faulty, example)

    def seen(self, drafts: Drafts) -> Drafts:
        raise NotImplementedError


@fault("step-drafts-penalties-unseen", "step", killed_by="step.drafts_penalties.001")
class PenaltiesUnseen(SeenFault):
    """Penalties at a sample do not see the tokens drafted before it."""

    def seen(self, drafts: Drafts) -> Drafts:
        return replace(drafts, most=0)


@fault("step-drafts-penalties-see-one-draft", "step", killed_by="step.drafts_penalties.001")
class PenaltiesSeeOneDraft(SeenFault):
    """Penalties at a sample see the draft just before it, and none before that."""

    def seen(self, drafts: Drafts) -> Drafts:
        return replace(drafts, most=1)


@fault("step-drafts-penalties-see-the-own-draft", "step", killed_by="step.drafts_penalties.001")
class PenaltiesSeeTheOwnDraft(SeenFault):
    """Penalties at a sample see the token drafted behind it as drawn, in place of the row's first draft."""

    def seen(self, drafts: Drafts) -> Drafts:
        return replace(drafts, ids=drafts.ids.roll(-1))


@fault("step-drafts-penalties-see-all-rows", "step", killed_by="step.drafts_penalties.001")
class PenaltiesSeeAllRows(SeenFault):
    """Penalties at a sample see what was drafted in the rows before as well."""

    def seen(self, drafts: Drafts) -> Drafts:
        return replace(drafts, first_samples=torch.zeros_like(drafts.first_samples))
