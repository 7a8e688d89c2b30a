"""Drafts in steps: who gets them, and where a sequence stands once it is known which were drawn."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from anychip.engine_stats import SpeculationStats
from anychip.kv_cache.manager import KVCacheManager
from anychip.request import Request
from anychip.scheduler.proposing import Proposing
from anychip.scheduler.step import ScheduledStep, StepDraft
from anychip.speculation.speculator import Speculator
from anychip.types import Slot


class Drafting:
    """Drafts take what rows without drafts leave: of the step's room, and of the pool's free blocks."""

    def __init__(self, kv: KVCacheManager, speculator: Speculator) -> None:
        self._kv = kv
        self._speculator = speculator
        self._rewinds: dict[Slot, int] = {}  # by slot: tokens that are computed after all
        self.proposing = Proposing(kv, speculator) if speculator.drafts_in_workers else None
        self.arrived = speculator.begin
        self.ended = speculator.end

    @property
    def stats(self) -> SpeculationStats:
        return self._speculator.stats

    def measured_costs_are_ignored(self) -> None:
        """Every draft is tried from now on, whether it pays or not: for those who judge drafts."""
        self._speculator.costs = None

    # -- a step out ---------------------------------------------------------------------------------------

    def add_to(self, draft: StepDraft, running: Sequence[Request]) -> None:
        """Called when every row has its place."""
        self._speculator.take_in(running)
        self._add_known(draft)
        if self.proposing is not None:
            self.proposing.ask(draft)

    def _add_known(self, draft: StepDraft) -> None:
        """The drafts that are there."""
        rows: list[int] = []
        requests: list[Request] = []
        most: list[int] = []
        for row, (request, count) in enumerate(zip(draft.rows, draft.counts, strict=True)):
            if count == 1 and request.speculation is not None and not request.num_promised:
                num_output = len(request.output_token_ids)
                follow = request.max_output - num_output - 1  # its next step draws a token, and these may follow
                if follow > 0 and request.num_prompt + num_output == request.num_computed + 1:
                    rows.append(row)
                    requests.append(request)
                    most.append(follow)
        if not rows:
            return
        drafts, lengths = self._speculator.choose(
            requests, most, num_rows=len(draft.rows), num_tokens=sum(draft.counts)
        )
        if lengths.any():
            granted = draft.room.grant_drafts(lengths)
            draft.place_drafts(rows, drafts, self._with_blocks(requests, granted))

    def _with_blocks(self, requests: Sequence[Request], lengths: np.ndarray) -> np.ndarray:
        """The lengths, but 0 where the pool is short."""
        wanted, allocate = lengths.tolist(), self._kv.allocate
        for at, (request, length) in enumerate(zip(requests, wanted, strict=True)):
            if length and request.num_computed + length >= request.next_change_at and not allocate(request, 1 + length):
                wanted[at] = 0
        return np.array(wanted)

    def give_back(self, running: Sequence[Request]) -> bool:
        """Blocks that are held for guesses alone; whether any is free now."""
        return self.proposing is not None and self.proposing.give_back(running)

    def waits(self, running: Sequence[Request]) -> bool:
        """Whether the next step is worth more once the step in flight is taken in."""
        requests = [each for each in running if each.num_promised == 1 and each.speculation is not None]
        most = [each.max_output - len(each.output_token_ids) - 1 for each in requests]
        if not any(follow > 1 for follow in most):
            return False
        self._speculator.take_in(running)
        num_rows = sum(each.num_promised == 1 for each in running)
        return self._speculator.pays(requests, most, num_rows=num_rows)

    def take_rewinds(self) -> bytes:
        """For the workers, as StepDecision has them."""
        flat = array("i", [number for pair in self._rewinds.items() for number in pair]).tobytes()
        self._rewinds.clear()
        return flat

    def forget(self, slot: Slot) -> None:
        """The slot is given up."""
        self._rewinds.pop(slot, None)

    # -- a result in --------------------------------------------------------------------------------------

    def rewind(self, request: Request) -> None:
        """Not all of a sequence's drafts were drawn, or it ends before. What was computed for the others is nothing:
        the next steps overwrite it."""
        computed = request.num_known - 1
        request.num_computed = computed
        assert request.slot is not None
        self._rewinds[request.slot] = computed
        self._kv.trim(request)

    def taken_in(self, step: ScheduledStep, num_gained: Sequence[int]) -> None:
        """A step with drafts has come back: what each of its sampling rows gained."""
        assert step.drafted is not None
        gained = np.array(num_gained)
        self._speculator.judged(step.drafted, gained[np.array(step.num_drafts) > 0] - 1)
        num_tokens = sum(memoryview(step.decision.num_tokens).cast("i"))
        self._speculator.taken_in(len(gained), num_tokens, int(gained.sum()))
