"""How many tokens to draft: as many as make the step pay, by what steps cost and by how often drafts were drawn.

A step of R sequences takes C(T) seconds for T tokens and brings R tokens, and one more for each draft that is drawn. A
draft is worth trying while what it adds, its probability over its cost, is more than what the step brings already.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

_EVIDENCE = (3, 4, 6, 8, 12, 16, 24, 32)
"""Upper ends of the classes of evidence whose acceptance is counted together."""

_WEIGHT = 8.0
"""How many drafts the first guess of a class's acceptance counts for."""

_NEWEST = 0.1
"""Weight of the newest draft in a sequence's own acceptance."""

_FADING = 0.999
"""The share of earlier counts that is kept from a draft to the next, so that old ones count less."""


class StepCosts:
    """Seconds of a step by its tokens, measured when the engine started; between two sizes linear."""

    def __init__(self, measured: Sequence[tuple[int, float]]) -> None:
        """`measured` has (tokens, seconds) by growing tokens, one pair at least. What disturbs a measurement makes it
        longer, so a step costs at most what a larger one took."""
        self._tokens = [tokens for tokens, _ in measured]
        seconds = [seconds for _, seconds in reversed(measured)]
        self._seconds = list(accumulate(seconds, min))[::-1]

    def __call__(self, tokens: float) -> float:
        sizes, seconds = self._tokens, self._seconds
        at = bisect_left(sizes, tokens)
        if at == 0:
            return seconds[0]
        if at == len(sizes):  # beyond the largest: as the last two sizes go, or in proportion
            at -= 1
            if at == 0:
                return seconds[0] * tokens / sizes[0]
        share = (tokens - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])


class Acceptance:
    """How likely the next draft is drawn when all before it were: by evidence over all sequences, and by sequence."""

    def __init__(self) -> None:
        self._first = [_WEIGHT * min(0.9, 0.25 + 0.08 * most) for most in (*_EVIDENCE, 48)]
        self._drawn = list(self._first)
        self._tried = [_WEIGHT] * len(self._first)

    def rate(self, evidence: int) -> float:
        """Of drafts that rest on so many tokens."""
        place = bisect_left(_EVIDENCE, evidence)
        return self._drawn[place] / self._tried[place]

    def add(self, evidence: int, num_drafts: int, num_drawn: int) -> None:
        """Of `num_drafts` drafts in a row, the first `num_drawn` were drawn; the next one, if any, was not."""
        for at in range(min(num_drafts, num_drawn + 1)):
            place = bisect_left(_EVIDENCE, evidence + at)
            self._drawn[place] = self._drawn[place] * _FADING + (at < num_drawn)
            self._tried[place] = self._tried[place] * _FADING + 1

    def forget(self) -> None:
        """Goes halfway back to the first guess: drafts that are not tried any more may have become good ones."""
        for place, first in enumerate(self._first):
            self._drawn[place] = (self._drawn[place] + first) / 2
            self._tried[place] = (self._tried[place] + _WEIGHT) / 2

    def chances(self, evidence: int, count: int, own: float | None) -> list[float]:
        """The probability that the first, the first two ... of `count` drafts are drawn. `own` is the sequence's rate,
        None where it has none yet."""
        found, chance = [], 1.0
        for at in range(count):
            rate = self.rate(evidence + at)
            chance *= rate if own is None else (rate + own) / 2
            found.append(chance)
        return found


def newer_rate(own: float | None, num_drafts: int, num_drawn: int) -> float:
    """A sequence's own acceptance after another run of drafts."""
    for drawn in [True] * num_drawn + [False] * (num_drawn < num_drafts):
        own = float(drawn) if own is None else own + _NEWEST * (drawn - own)
    return 0.0 if own is None else own


def choose_lengths(
    chances: Sequence[Sequence[float]], *, num_rows: int, num_tokens: int, costs: StepCosts, overhead_s: float
) -> tuple[list[int], float]:
    """How many drafts each candidate gets, and the tokens a second that the step then brings. `chances` by candidate
    as Acceptance gives them; without drafts the step has `num_tokens` and brings a token for each of `num_rows`.
    `overhead_s` is what a step takes beyond its cost."""
    lengths = [0] * len(chances)
    gained, seconds = float(num_rows), costs(num_tokens) + overhead_s
    best_rate, best_lengths = gained / seconds, list(lengths)
    order = sorted(
        ((chance, which) for which, each in enumerate(chances) for chance in each), key=lambda pair: -pair[0]
    )
    # Costs grow in steps where shapes are padded, so a draft that does not pay may be followed by one that does.
    for chance, which in order:
        lengths[which] += 1
        num_tokens += 1
        gained += chance
        rate = gained / (costs(num_tokens) + overhead_s)
        if rate > best_rate:
            best_rate, best_lengths = rate, list(lengths)
    return best_lengths, best_rate
