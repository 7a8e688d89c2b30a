"""A proposer for engines that are judged: it knows the answers, and is wrong now and then."""

from __future__ import annotations

import random
from collections.abc import Sequence

from anychip.drafts import Draft
from anychip.speculation.proposer import PROPOSERS

NAME = "suite-answers"
PROPOSERS[NAME] = f"{__name__}:Answers"

_WRONG = 0.25
"""The share of drafts with a wrong token in them."""


class Answers:
    """Proposer and drafter in one. `texts` are the whole texts, prompts and all, that the engine will draw."""

    texts: Sequence[Sequence[int]] = ()

    def __init__(self) -> None:
        self.told: list[int] = []
        self.rng = random.Random(0)

    def begin(self, owner: str) -> Answers:
        drafter = type(self)()
        drafter.rng = self.rng  # or every sequence would have its misses at the same places
        return drafter

    def end(self, drafter: Answers) -> None:
        """Nothing is kept."""

    def extend(self, token_ids: Sequence[int]) -> None:
        self.told += token_ids

    def catch_up(self, most: int) -> int:
        return most

    def follows(self, most: int) -> list[int]:
        """What the engine will draw next."""
        count = len(self.told)
        texts = (text for text in self.texts if list(text[:count]) == self.told)
        return list(next(texts, ())[count : count + most])

    def draft(self, most: int) -> Draft:
        ids = self.follows(self.rng.randrange(most + 1))
        if ids and self.rng.random() < _WRONG:
            at = self.rng.randrange(len(ids))
            ids[at] = ids[at] % 100 + 3
        return Draft(ids, 32)
