"""A proposer for engines that are judged: it knows the answers, and is wrong now and then."""

from __future__ import annotations

import random
from collections.abc import Sequence

from anychip.drafts import NO_DRAFT, Draft
from anychip.speculation.proposer import PROPOSERS

NAME = "suite-answers"
PROPOSERS[NAME] = f"{__name__}:Answers"

_WRONG = 0.25
"""The share of drafts with a wrong token in them."""


class Answers:
    """Proposer and drafter in one. `texts` are the whole texts, prompts and all, that the engine will draw."""

    texts: Sequence[Sequence[int]] = ()

    def __init__(self) -> None:
        self._told: list[int] = []
        self._rng = random.Random(0)

    def begin(self, tenant: str) -> Answers:
        return Answers()

    def end(self, drafter: Answers) -> None:
        """Nothing is kept."""

    def extend(self, token_ids: Sequence[int]) -> None:
        self._told += token_ids

    def catch_up(self, most: int) -> int:
        return most

    def draft(self, most: int) -> Draft:
        count = len(self._told)
        for text in self.texts:
            if list(text[:count]) == self._told:
                ids = list(text[count : count + self._rng.randrange(most + 1)])
                if ids and self._rng.random() < _WRONG:
                    at = self._rng.randrange(len(ids))
                    ids[at] = ids[at] % 100 + 3
                return Draft(ids, 32)
        return NO_DRAFT
