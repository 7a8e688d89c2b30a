"""Faults of step programs in steps with drafts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from anychip.plugin_api import SamplingInputs, ShapeKey, StepInputs
from anychip_conformance.fakes.static import DonatedState, StaticHidden, StaticStepProgram
from anychip_conformance.faulty.registry import fault
from anychip_conformance.faulty.steps import counts_of, with_counts


class DraftFault(StaticStepProgram):
    """A fault of steps with drafts changes what goes into them, or what comes out."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        if late.first_samples is None:
            return super().sample(state, hidden, late)
        return self.sample_drafts(state, hidden, late, late.first_samples)

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        return super().sample(state, hidden, late)


@fault("step-drafts-not-read", "step", killed_by="step.drafts.001")
class DraftsNotRead(StaticStepProgram):
    """The drafted tokens are not what is computed."""

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        if inputs.has_drafts:
            sampled = inputs.logits_indices[: inputs.num_samples]
            inputs.input_ids[np.intersect1d(sampled, sampled + 1)] = 7
        return super().forward(state, inputs)


@fault("step-drafts-one-hidden-state", "step", killed_by="step.drafts.001")
class OneHiddenState(DraftFault):
    """Every sample of a row draws from its first one's logits."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        logits = hidden.logits[torch.from_numpy(firsts.astype(np.int64))]
        return super().sample_drafts(state, replace(hidden, logits=logits), late, firsts)


@fault("step-drafts-last-id-of-the-first-sample", "step", killed_by="step.drafts.001")
class LastIdOfTheFirstSample(DraftFault):
    """A row goes on from what its first sample drew."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        state, results = super().sample_drafts(state, hidden, late, firsts)
        held, starts = state.take(), np.flatnonzero(firsts[: late.num_samples] == np.arange(late.num_samples))
        ids = torch.from_numpy(results.host.token_ids[starts])
        slots = hidden.slots[torch.from_numpy(starts)].long()
        return DonatedState(replace(held, last_ids=held.last_ids.index_copy(0, slots, ids))), results


@fault("step-drafts-last-id-though-rejected", "step", killed_by="step.drafts.001")
class LastIdThoughRejected(DraftFault):
    """A row goes on from what its last sample drew, kept or not."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        state, results = super().sample_drafts(state, hidden, late, firsts)
        held = state.take()
        last_ids = held.last_ids.clone()
        for sample in range(late.num_samples):
            last_ids[int(hidden.slots[sample])] = int(results.host.token_ids[sample])
        return DonatedState(replace(held, last_ids=last_ids)), results


@fault("step-drafts-logprobs-shifted", "step", killed_by="step.drafts.001")
class LogprobsShifted(DraftFault):
    """A sample reports the log-probabilities of the one behind it."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        state, results = super().sample_drafts(state, hidden, late, firsts)
        host = results.host
        if host.top_ids is not None:
            host.top_ids = np.roll(host.top_ids, -1, axis=0)
        return state, results


@fault("step-drafts-mask-of-the-first-sample", "step", killed_by="step.drafts_masks.001")
class MaskOfTheFirstSample(DraftFault):
    """The mask of a row's first sample holds for all of them."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        if late.masks is not None:
            late.masks[:] = late.masks[firsts]
        return super().sample_drafts(state, hidden, late, firsts)


@fault("step-drafts-mask-of-the-next-sample", "step", killed_by="step.drafts_masks.001")
class MaskOfTheNextSample(DraftFault):
    """Each mask holds for the sample before its own."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        if late.masks is not None:
            late.masks[:] = np.roll(late.masks, -1, axis=0)
        return super().sample_drafts(state, hidden, late, firsts)


@fault("step-drafts-penalties-unseen", "step", killed_by="step.drafts_penalties.001")
class PenaltiesUnseen(StaticStepProgram):
    """Penalties at a sample do not see the tokens drafted before it."""

    def _compile_sampler(self, key: ShapeKey) -> None:
        limits, self.limits = self.limits, replace(self.limits, max_drafts=0)
        try:
            super()._compile_sampler(key)
        finally:
            self.limits = limits


@fault("step-drafts-rejected-ones-count", "step", killed_by="step.drafts_penalties.001")
class RejectedOnesCount(DraftFault):
    """What rejected samples drew counts for their slots."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        state, results = super().sample_drafts(state, hidden, late, firsts)
        counts, host = counts_of(state).clone(), results.host
        for sample in np.flatnonzero(~host.kept):
            counts[int(hidden.slots[sample]), int(host.token_ids[sample])] += 2
        return with_counts(state, counts), results


@fault("step-drafts-kept-ones-do-not-count", "step", killed_by="step.drafts_penalties.001")
class KeptOnesDoNotCount(DraftFault):
    """Of what a row keeps, the first token alone is counted."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        before = counts_of(state).clone()
        state, results = super().sample_drafts(state, hidden, late, firsts)
        for sample in np.flatnonzero(firsts[: late.num_samples] == np.arange(late.num_samples)):
            before[int(hidden.slots[sample]), int(results.host.token_ids[sample])] += 2
        return with_counts(state, before), results


@fault("step-drafts-one-position", "step", killed_by="e2e.speculated.002")
class OnePosition(DraftFault):
    """Every sample of a row is drawn with the number of its first one's position."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        late.position[:] = late.position[firsts]
        return super().sample_drafts(state, hidden, late, firsts)


@fault("step-drafts-position-off-by-one", "step", killed_by="e2e.speculated.002")
class PositionOffByOne(DraftFault):
    """In steps with drafts, positions are those of the tokens before."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        late.position[:] -= 1
        return super().sample_drafts(state, hidden, late, firsts)


@fault("step-drafts-parameters-of-the-next-sample", "step", killed_by="e2e.speculated.002")
class ParametersOfTheNextSample(DraftFault):
    """A row's last sample draws with the seed of the row behind it."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        late.seed_low[:], late.sample_index[:] = np.roll(late.seed_low, -1), np.roll(late.sample_index, -1)
        return super().sample_drafts(state, hidden, late, firsts)
