"""Faults of steps with drafts: from what a row goes on, what is counted, and what is reported of a sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from anychip.plugin_api import HostOutputs, SamplingInputs
from anychip_conformance.fakes.static import DonatedState, StaticHidden
from anychip_conformance.faulty.registry import fault
from anychip_conformance.faulty.step_drafts import DraftFault
from anychip_conformance.faulty.steps import counts_of, with_counts


def first_samples(late: SamplingInputs) -> np.ndarray:
    """Indexes of the samples that are their row's first."""
    assert late.first_samples is not None
    return np.flatnonzero(late.first_samples[: late.num_samples] == np.arange(late.num_samples))


def misses(late: SamplingInputs, host: HostOutputs) -> np.ndarray:
    """Indexes of the samples that were kept, and drew another token than their draft."""
    assert late.draft_ids is not None and host.kept is not None
    draft_ids = late.draft_ids[: late.num_samples]
    return np.flatnonzero(host.kept & (draft_ids >= 0) & (host.token_ids != draft_ids))


# -- from what a row goes on ----------------------------------------------------------------------------------


class LastIdsFault(DraftFault):
    """A fault changes last ids [max_slots + 1] after a step with drafts. `slots` [num_samples, with padding]."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        state, results = super().sample_drafts(state, hidden, late, firsts)
        held = state.take()
        last_ids = held.last_ids.clone()
        self.change(last_ids.numpy(), hidden.slots.numpy(), late, results.host)
        return DonatedState(replace(held, last_ids=last_ids)), results

    def change(self, last_ids: np.ndarray, slots: np.ndarray, late: SamplingInputs, host: HostOutputs) -> None:
        raise NotImplementedError


@fault("step-drafts-last-id-of-the-first-sample", "step", killed_by="step.drafts.001")
class LastIdOfTheFirstSample(LastIdsFault):
    """A row goes on from what its first sample drew."""

    def change(self, last_ids: np.ndarray, slots: np.ndarray, late: SamplingInputs, host: HostOutputs) -> None:
        firsts = first_samples(late)
        last_ids[slots[firsts]] = host.token_ids[firsts]


@fault("step-drafts-last-id-though-rejected", "step", killed_by="step.drafts.001")
class LastIdThoughRejected(LastIdsFault):
    """A row goes on from what its last sample drew, kept or not."""

    def change(self, last_ids: np.ndarray, slots: np.ndarray, late: SamplingInputs, host: HostOutputs) -> None:
        lasts = np.append(first_samples(late)[1:], late.num_samples) - 1
        last_ids[slots[lasts]] = host.token_ids[lasts]


@fault("step-drafts-last-id-of-the-draft", "step", killed_by="step.drafts.001")
class LastIdOfTheDraft(LastIdsFault):
    """Where a draft misses, the row goes on from the draft."""

    def change(self, last_ids: np.ndarray, slots: np.ndarray, late: SamplingInputs, host: HostOutputs) -> None:
        assert late.draft_ids is not None
        missed = misses(late, host)
        last_ids[slots[missed]] = late.draft_ids[missed]


@fault("step-drafts-last-ids-of-padding", "step", killed_by="step.drafts.001")
class LastIdsOfPadding(LastIdsFault):
    """What is nobody's becomes the first slot's last id."""

    def change(self, last_ids: np.ndarray, slots: np.ndarray, late: SamplingInputs, host: HostOutputs) -> None:
        last_ids[0] = last_ids[-1]


@fault("step-drafts-forget-rows-that-wait", "step", killed_by="step.drafts.001")
class ForgetRowsThatWait(LastIdsFault):
    """A step with drafts leaves no last id in the slots that it does not name."""

    def change(self, last_ids: np.ndarray, slots: np.ndarray, late: SamplingInputs, host: HostOutputs) -> None:
        last_ids[~np.isin(np.arange(len(last_ids)), slots)] = 0


# -- what is counted ------------------------------------------------------------------------------------------


class CountsFault(DraftFault):
    """A fault changes counts [max_slots + 1, vocab_size] after a step with drafts. `before` are those before it."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        before = counts_of(state).clone()
        state, results = super().sample_drafts(state, hidden, late, firsts)
        counts = counts_of(state).clone()
        self.change(counts, before, hidden.slots.numpy(), late, results.host)
        return with_counts(state, counts), results

    def change(
        self, counts: torch.Tensor, before: torch.Tensor, slots: np.ndarray, late: SamplingInputs, host: HostOutputs
    ) -> None:
        raise NotImplementedError


@fault("step-drafts-rejected-ones-count", "step", killed_by="step.drafts_penalties.001")
class RejectedOnesCount(CountsFault):
    """What rejected samples drew counts for their slots."""

    def change(
        self, counts: torch.Tensor, before: torch.Tensor, slots: np.ndarray, late: SamplingInputs, host: HostOutputs
    ) -> None:
        assert host.kept is not None
        for sample in np.flatnonzero(~host.kept):
            counts[slots[sample], host.token_ids[sample]] += 2


@fault("step-drafts-kept-ones-do-not-count", "step", killed_by="step.drafts_penalties.001")
class KeptOnesDoNotCount(CountsFault):
    """Of what a row keeps, the first token alone is counted."""

    def change(
        self, counts: torch.Tensor, before: torch.Tensor, slots: np.ndarray, late: SamplingInputs, host: HostOutputs
    ) -> None:
        counts.copy_(before)
        for sample in first_samples(late):
            counts[slots[sample], host.token_ids[sample]] += 2


@fault("step-drafts-count-drafts", "step", killed_by="step.drafts_penalties.001")
class CountDrafts(CountsFault):
    """Where a draft misses, the draft is counted and the token that was drawn is not."""

    def change(
        self, counts: torch.Tensor, before: torch.Tensor, slots: np.ndarray, late: SamplingInputs, host: HostOutputs
    ) -> None:
        assert late.draft_ids is not None
        for sample in misses(late, host):
            counts[slots[sample], host.token_ids[sample]] -= 2
            counts[slots[sample], late.draft_ids[sample]] += 2


@fault("step-drafts-padding-counts", "step", killed_by="step.drafts_penalties.001")
class PaddingCounts(CountsFault):
    """What rejected and padded samples draw counts for the first slot."""

    def change(
        self, counts: torch.Tensor, before: torch.Tensor, slots: np.ndarray, late: SamplingInputs, host: HostOutputs
    ) -> None:
        counts[0] += counts[-1] - before[-1]


# -- what is reported -----------------------------------------------------------------------------------------


class ReportFault(DraftFault):
    """A fault changes the log-probabilities that a step with drafts reports."""

    def sample_drafts(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs, firsts: np.ndarray) -> Any:
        state, results = super().sample_drafts(state, hidden, late, firsts)
        if results.host.chosen_logprobs is not None:
            self.change(results.host, firsts[: late.num_samples])
        return state, results

    def change(self, host: HostOutputs, firsts: np.ndarray) -> None:
        raise NotImplementedError


@fault("step-drafts-likeliest-tokens-of-the-next-sample", "step", killed_by="step.drafts.001")
class LikeliestTokensOfTheNextSample(ReportFault):
    """A sample reports the likeliest tokens of the one behind it."""

    def change(self, host: HostOutputs, firsts: np.ndarray) -> None:
        assert host.top_ids is not None
        host.top_ids = np.roll(host.top_ids, -1, axis=0)


@fault("step-drafts-chosen-logprob-of-the-next-sample", "step", killed_by="step.drafts.001")
class ChosenLogprobOfTheNextSample(ReportFault):
    """A drawn token is reported with the log-probability of the one drawn behind it."""

    def change(self, host: HostOutputs, firsts: np.ndarray) -> None:
        assert host.chosen_logprobs is not None
        host.chosen_logprobs = np.roll(host.chosen_logprobs, -1)


@fault("step-drafts-likeliest-logprobs-of-the-first-sample", "step", killed_by="step.drafts.001")
class LikeliestLogprobsOfTheFirstSample(ReportFault):
    """The likeliest tokens are a sample's own, and their log-probabilities those of its row's first."""

    def change(self, host: HostOutputs, firsts: np.ndarray) -> None:
        assert host.top_logprobs is not None
        host.top_logprobs = host.top_logprobs[firsts]
