"""Drafts in steps: who gets them, and where a sequence stands once it is known which were drawn."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import SpeculationStats
from anychip.request import Request
from anychip.scheduler.step import ScheduledStep, StepDraft
from anychip.speculation.speculator import Speculator
from anychip.types import Slot


class Drafting:
    """Drafts take what rows without drafts leave: of the step's room, and of the pool's free blocks."""

    def __init__(self, kv: KVCacheManager, speculator: Speculator) -> None:
        self._kv = kv
        self._speculator = speculator
        self._rewinds: dict[Slot, int] = {}  # by slot: tokens that are computed after all
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
        rows = [row for row, count in enumerate(draft.counts) if count == 1 and _may_draft(draft.rows[row])]
        if not rows:
            return
        wanted = [(draft.rows[row], _most_drafts(draft.rows[row])) for row in rows]
        chosen = self._speculator.choose(wanted, num_rows=len(draft.rows), num_tokens=sum(draft.counts))
        for row, found in zip(rows, chosen, strict=True):
            granted = draft.room.grant_drafts(len(found.token_ids)) if found.token_ids else 0
            if granted and self._kv.allocate(draft.rows[row], 1 + granted):
                draft.place_draft(row, found.token_ids[:granted])
                self._speculator.launched(draft.rows[row], found)

    def waits(self, running: Sequence[Request]) -> bool:
        """Whether the next step is worth more once the step in flight is taken in."""
        rows = [(request, _most_drafts(request)) for request in running if request.num_promised == 1]
        return any(most > 0 for _, most in rows) and self._speculator.pays(rows)

    def take_rewinds(self) -> bytes:
        """For the workers, as StepDecision has them."""
        flat = array("i", [number for pair in self._rewinds.items() for number in pair]).tobytes()
        self._rewinds.clear()
        return flat

    def forget(self, slot: Slot) -> None:
        """The slot is given up."""
        self._rewinds.pop(slot, None)

    # -- a result in --------------------------------------------------------------------------------------

    def judge(self, request: Request, num_drafts: int, num_gained: int) -> None:
        """A sequence gained so many tokens, which are known now, by a step in which `num_drafts` were drafted. What was
        computed for drafts that were not drawn is nothing: the next steps overwrite it."""
        self._speculator.judged(request, num_drafts, num_gained - 1)
        computed = request.num_known - 1
        if request.num_computed > computed:
            request.num_computed = computed
            assert request.slot is not None
            self._rewinds[request.slot] = computed
            self._kv.trim(request)

    def taken_in(self, step: ScheduledStep, num_gained: int) -> None:
        """A step with drafts has come back."""
        num_tokens = sum(memoryview(step.decision.num_tokens).cast("i"))
        self._speculator.taken_in(len(step.sampling), num_tokens, num_gained)


def _may_draft(request: Request) -> bool:
    """Its next step draws the token behind its last known one, and nothing is in flight for it."""
    return (
        request.speculation is not None
        and not request.num_promised
        and request.num_known == request.num_computed + 1
        and _most_drafts(request) > 0
    )


def _most_drafts(request: Request) -> int:
    """Tokens that may follow the one that its next step draws."""
    return 0 if request.speculation is None else request.max_output - request.num_output - 1
