"""Proposers that do all that a proposer may do, and much that it may not: `--speculate` finds them by their names."""

from __future__ import annotations

import time
from itertools import repeat
from typing import Any

import pytest

from anychip.drafts import NO_DRAFT, Draft
from anychip.speculation.proposer import PROPOSERS
from anychip_conformance.drafts import Answers

FAVOURITES = "favourites"

LATE_S = 0.3
"""What the late one sleeps: tests lower the limit to less than that."""

_NOT_DRAFTS: tuple[Any, ...] = (None, "drafts", ([5], 3), Draft(["5"], 3), Draft([5.0], 3), Draft([5], "3"))


class Right(Answers):
    """Always right, and as far as it may go."""

    def draft(self, most: int) -> Draft:
        return Draft(self.follows(most), 32)


class Lengths(Answers):
    """Right, and one token longer each time, from none to all that it may."""

    num_drafts = 0

    def draft(self, most: int) -> Draft:
        self.num_drafts += 1
        return Draft(self.follows(self.num_drafts % (most + 1)), 32)


class Random(Answers):
    """Any tokens of a small vocabulary, special ones and those that end a text among them, and sure of it."""

    def draft(self, most: int) -> Draft:
        return Draft(self.rng.choices(range(300), k=self.rng.randrange(most + 1)), 1000)


class Favourites(Answers):
    """Few tokens, over and over: were they kept more often than they are drawn, there would be more of them."""

    ids = (5, 7, 11)

    def draft(self, most: int) -> Draft:
        return Draft(self.rng.choices(self.ids, k=most), 32)


class Endless(Answers):
    """More than it may, without end."""

    def draft(self, most: int) -> Draft:
        return Draft(repeat(self.rng.randrange(300)), 3)  # type: ignore[arg-type]


class Beyond(Answers):
    """Right, but that now and then an id that no token has stands behind."""

    def draft(self, most: int) -> Draft:
        ids = self.follows(self.rng.randrange(most))
        if self.rng.random() < 0.2:
            ids.append(self.rng.choice([-1, -5, 512, 2**31, 2**70]))
        return Draft(ids, 32)


class Raising(Answers):
    """Right, but that any call may raise."""

    def __init__(self) -> None:
        super().__init__()
        for number, name in enumerate(("begin", "end", "extend", "catch_up", "draft")):
            setattr(self, name, self._now_and_then(getattr(self, name), number))

    def _now_and_then(self, call: Any, number: int) -> Any:
        def called(*given: Any) -> Any:
            if self.rng.random() < 0.1:
                raise (OSError, SystemExit, StopIteration, KeyError, RecursionError)[number]("now and then")
            return call(*given)

        return called


class Garbage(Answers):
    """Right, but that now and then it returns what is no draft."""

    def draft(self, most: int) -> Any:
        return Draft(self.follows(most), 32) if self.rng.random() < 0.8 else self.rng.choice(_NOT_DRAFTS)


class Late(Answers):
    """Answers late, now and then."""

    def draft(self, most: int) -> Draft:
        if self.rng.random() < 0.02:
            time.sleep(LATE_S)
            return NO_DRAFT
        return Draft(self.follows(most), 32)


MISBEHAVING = {"beyond": Beyond, "raising": Raising, "garbage": Garbage, "late": Late}
"""Those whose failures are counted."""

HOSTILE = {
    "right": Right, "lengths": Lengths, "random": Random, FAVOURITES: Favourites, "endless": Endless, **MISBEHAVING,
}  # fmt: skip


@pytest.fixture(autouse=True)
def found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the modules that import it, and nowhere else, `--speculate` knows these."""
    for name, made in HOSTILE.items():
        monkeypatch.setitem(PROPOSERS, name, f"{__name__}:{made.__name__}")
