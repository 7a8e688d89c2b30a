"""What is guessed of one sequence: a draft, what makes it, and where that stands. Does not choose lengths or judge what
came of a draft: speculation/ does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Draft(NamedTuple):
    """Tokens that may follow, and the number of tokens before them on which the guess rests: the more they are, the
    likelier it holds."""

    token_ids: Sequence[int]
    evidence: int


NO_DRAFT = Draft((), 0)


class Drafter(Protocol):
    """Guesses how one sequence goes on. What it raises, what is no draft, and a call that takes more than a second cost
    its sequence the drafts, and nothing else."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """These tokens follow those before. Called with the prompt first. Cheap: the work is `catch_up`'s."""
        ...

    def catch_up(self, most: int) -> int:
        """Takes in at most `most` of the tokens that it was told of; returns how many it took in."""
        ...

    def draft(self, most: int) -> Draft:
        """What may follow the last token, at most `most` tokens of the vocabulary. Called once all are taken in."""
        ...


@dataclass(slots=True)
class Speculation:
    """What belongs to one sequence. Without a drafter, what a grammar forces is drafted alone."""

    drafter: Drafter | None
    num_told: int = 0
    """Tokens that the drafter was told of."""
    behind: int = 0
    """Of those, the ones that it has not taken in."""
    rate: float = math.nan
    """How often its drafts were drawn; nan: nobody knows yet."""


class Drafts(NamedTuple):
    """Drafts of several sequences at once."""

    token_ids: np.ndarray  # [sum of counts] int32, one sequence's after the other's
    counts: np.ndarray  # [num_sequences] how many are whose
    evidence: np.ndarray  # [num_sequences]


class Drafted(NamedTuple):
    """What is drafted in a step, by the rows that have drafts."""

    speculations: Sequence[Speculation]
    token_ids: np.ndarray  # [sum of counts] int32
    counts: np.ndarray  # [num_rows] 1 or more
    evidence: np.ndarray  # [num_rows]
