"""Drafts of a draft model or of heads, which run in the workers: what came with a step waits here for the next one.

Does not run them: worker/draft_runner and its like do, as far as the scheduler asks for it (scheduler/proposing).
"""

from __future__ import annotations

from collections.abc import Sequence

from anychip.drafts import NO_DRAFT, Draft, Drafter

EVIDENCE = 5
"""What a draft model's drafts are said to rest on. How often they are drawn is soon counted."""


class ReturnedDrafts:
    """One sequence's drafts."""

    def __init__(self) -> None:
        self._num_told = 0
        self._ids: Sequence[int] = ()
        self._at = 0  # the place of the first of them in the sequence

    def returned(self, num_known: int, token_ids: Sequence[int]) -> None:
        """The workers drafted these behind the sequence's first `num_known` tokens."""
        self._at, self._ids = num_known, token_ids

    def extend(self, token_ids: Sequence[int]) -> None:
        """What is left of a draft that the new tokens agree with is still one."""
        before, self._num_told = self._num_told, self._num_told + len(token_ids)
        if not self._ids or self._at >= self._num_told:
            return
        new = list(token_ids[self._at - before :]) if self._at >= before else None
        held = new is not None and list(self._ids[: len(new)]) == new
        self._ids = self._ids[len(new) :] if new is not None and held else ()
        self._at = self._num_told

    def catch_up(self, most: int) -> int:
        return most

    def draft(self, most: int) -> Draft:
        return Draft(list(self._ids[:most]), EVIDENCE) if self._ids and self._at == self._num_told else NO_DRAFT


class DraftModel:
    """Proposer "draft:MODEL", "eagle:HEAD", "medusa:HEADS" and "mtp". Each sees one sequence at a time, so nothing of
    one owner shows in another's, but for the page of a head that docs/decisions/0051 names."""

    def begin(self, owner: str) -> Drafter:
        return ReturnedDrafts()

    def end(self, drafter: Drafter) -> None:
        """Nothing is kept."""
