"""Which rows of a step the workers' draft model drafts behind, and what comes back of it.

Blocks for guesses are taken where they are free, and are the first to go back where others need one.
"""

from __future__ import annotations

from collections.abc import Sequence

from anychip.kv_cache.manager import KVCacheManager
from anychip.request import Request
from anychip.scheduler.step import ScheduledStep, StepDraft
from anychip.speculation.draft_model import ReturnedDrafts
from anychip.speculation.speculator import Speculator
from anychip.step_messages import StepResult


class Proposing:
    """For an engine with a draft model."""

    def __init__(self, kv: KVCacheManager, speculator: Speculator) -> None:
        self._kv = kv
        self._speculator = speculator

    def ask(self, draft: StepDraft) -> None:
        """Called when a step's rows have their places and their drafts. Asks for drafts behind those that draw."""
        rows: list[int] = []
        requests: list[Request] = []
        most: list[int] = []
        num_drafts = draft.num_drafts or [0] * len(draft.rows)
        for row, (request, count, drafts) in enumerate(zip(draft.rows, draft.counts, num_drafts, strict=True)):
            speculation = request.speculation
            if speculation is None or speculation.drafter is None:
                continue
            known = request.num_known + request.num_promised
            # The step draws one token and perhaps all of its drafts; the next one draws a token, and these may follow.
            follow = request.num_prompt + request.max_output - known - drafts - 2
            if follow > 0 and request.num_computed + count - drafts == known:
                rows.append(row)
                requests.append(request)
                most.append(follow)
        if not rows:
            return
        depth = self._speculator.depth(requests, most, num_rows=len(draft.rows))
        lengths = [0] * len(draft.rows)
        for row, request, follow in zip(rows, requests, most, strict=True):
            length = min(depth, follow, self._speculator.max_drafts)
            if length and self._kv.allocate(request, draft.counts[row] + length):
                lengths[row] = length
        if any(lengths):
            draft.num_proposed = lengths

    def take(self, step: ScheduledStep, result: StepResult) -> None:
        """What was drafted behind a step that has been taken in."""
        ids = memoryview(result.proposed).cast("i").tolist()
        end = 0
        for request, epoch, count in step.proposing:
            first, end = end, end + count
            speculation = request.speculation
            if request.epoch != epoch or speculation is None or ids[first] < 0:
                continue
            if isinstance(speculation.drafter, ReturnedDrafts):
                speculation.drafter.returned(request.num_known, ids[first:end])

    def give_back(self, running: Sequence[Request]) -> bool:
        """Blocks that rows hold for guesses alone; whether any is free now."""
        before = self._kv.pool.num_free
        for request in running:
            if request.num_known + request.num_promised - request.num_computed <= 1:
                self._kv.trim(request)
        return self._kv.pool.num_free > before
