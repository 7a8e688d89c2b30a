"""How many tokens to draft: as many as make the step pay, by what steps cost and by how often drafts were drawn.

A step of R sequences takes C(T) seconds for T tokens and brings R tokens, and one more for each draft that is drawn. A
draft is worth trying while what it adds, its probability over its cost, is more than what the step brings already.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

_EVIDENCE = (3, 4, 6, 8, 12, 16, 24, 32)
"""Upper ends of the classes of evidence whose acceptance is counted together."""

_WEIGHT = 8.0
"""How many drafts the first guess of a class's acceptance counts for."""

_NEWEST = 0.1
"""Weight of the newest draft in a sequence's own acceptance."""

_FAR = 1e9
"""Tokens: more than a step has."""

_FADING = 0.999
"""The share of earlier counts that is kept from a draft to the next, so that old ones count less."""


_MOST_EVIDENCE = 64
"""From here on, evidence is one class."""

_CLASS_OF = np.searchsorted(_EVIDENCE, np.arange(_MOST_EVIDENCE + 1))  # by evidence: its class


class StepCosts:
    """Seconds of a step by its tokens, measured when the engine started; between two sizes linear."""

    def __init__(self, measured: Sequence[tuple[int, float]]) -> None:
        """`measured` has (tokens, seconds) by growing tokens, one pair at least. What disturbs a measurement makes it
        longer, so a step costs at most what a larger one took."""
        sizes = [float(tokens) for tokens, _ in measured]
        seconds = list(accumulate((seconds for _, seconds in reversed(measured)), min))[::-1]
        if len(sizes) > 1:  # beyond the largest: as the last two sizes go, or in proportion
            slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        else:
            slope = seconds[0] / sizes[0]
        self._sizes = [*sizes, sizes[-1] + _FAR]
        self._seconds = [*seconds, seconds[-1] + _FAR * slope]

    def __call__(self, tokens: float) -> float:
        sizes, seconds = self._sizes, self._seconds
        at = bisect_left(sizes, tokens)
        if at == 0:
            return seconds[0]
        share = (tokens - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])

    def each(self, first: int, count: int) -> np.ndarray:  # [count] float64
        """Of steps of `first` tokens, of one more, and so on."""
        return np.interp(np.arange(first, first + count), self._sizes, self._seconds)


class Acceptance:
    """How likely the next draft is drawn when all before it were: by evidence over all sequences, and by sequence."""

    def __init__(self) -> None:
        self._first = _WEIGHT * np.minimum(0.9, 0.25 + 0.08 * np.array((*_EVIDENCE, 48)))
        self._drawn = self._first.copy()
        self._tried = np.full(len(self._first), _WEIGHT)

    def rate(self, evidence: int) -> float:
        """Of drafts that rest on so many tokens."""
        place = _CLASS_OF[min(evidence, _MOST_EVIDENCE)]
        return float(self._drawn[place] / self._tried[place])

    def add(self, evidence: np.ndarray, num_drafts: np.ndarray, num_drawn: np.ndarray) -> None:
        """Of each sequence's `num_drafts` drafts, the first `num_drawn` were drawn; the next one, if any, was not. All
        are [num_sequences]."""
        tried = np.minimum(num_drafts, num_drawn + 1)
        at = np.arange(tried.max(initial=0))
        classes = _classes(evidence, at)
        tries = np.bincount(classes[at < tried[:, None]], minlength=len(self._first))
        draws = np.bincount(classes[at < num_drawn[:, None]], minlength=len(self._first))
        kept = _FADING**tries
        self._drawn = self._drawn * kept + draws
        self._tried = self._tried * kept + tries

    def forget(self) -> None:
        """Goes halfway back to the first guess: drafts that are not tried any more may have become good ones."""
        self._drawn = (self._drawn + self._first) / 2
        self._tried = (self._tried + _WEIGHT) / 2

    def chances(self, evidence: np.ndarray, counts: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The probability that the first, the first two ... of each sequence's `counts` drafts are drawn, and 0 behind
        them. `own` has the sequences' own rates, nan where one has none yet. [num_sequences, most of counts]"""
        at = np.arange(counts.max(initial=0))
        rates = (self._drawn / self._tried)[_classes(evidence, at)]
        known = ~np.isnan(own)
        rates[known] = (rates[known] + own[known, None]) / 2
        chances: np.ndarray = np.cumprod(rates, axis=1)
        chances[at >= counts[:, None]] = 0.0
        return chances


def _classes(evidence: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of each sequence's drafts by place: each rests on one token more than the one before."""
    classes: np.ndarray = _CLASS_OF[np.minimum(evidence[:, None] + at, _MOST_EVIDENCE)]
    return classes


def newer_rates(own: np.ndarray, num_drafts: np.ndarray, num_drawn: np.ndarray) -> np.ndarray:  # [num_sequences] all
    """Sequences' own acceptance after another run of drafts each, 1 at least; nan where one has none yet."""
    before = np.where(np.isnan(own), num_drawn > 0, own)  # its first draft counts alone
    kept = 1.0 - _NEWEST
    newer: np.ndarray = 1.0 - (1.0 - before) * kept**num_drawn
    newer[num_drawn < num_drafts] *= kept
    return newer


def choose_depth(
    chances: np.ndarray, most: np.ndarray, *, num_rows: int, costs: StepCosts, draft_costs: StepCosts, overhead_s: float
) -> tuple[int, float]:
    """How many tokens a draft model is to draft behind every candidate, and the tokens a second that come of it: by a
    step of `num_rows` rows that verifies them all, and one pass of the draft model for each. A candidate takes at most
    `most` [num_sequences]; `chances` as Acceptance gives them. 0 where that beats no step without drafts."""
    passes = (most > np.arange(chances.shape[1])[:, None]).sum(axis=1)  # by place: candidates that have a token there
    tokens = num_rows + np.cumsum(passes)
    seconds = np.array([costs(size) for size in tokens.tolist()]) + overhead_s
    seconds += np.cumsum([draft_costs(rows) for rows in passes.tolist()])
    rates = (num_rows + np.cumsum(chances.sum(axis=0))) / seconds
    best_rate = num_rows / costs(num_rows)
    if len(rates) and rates.max() > best_rate:
        return int(rates.argmax()) + 1, float(rates.max())
    return 0, best_rate


def choose_lengths(
    chances: np.ndarray, *, num_rows: int, num_tokens: int, costs: StepCosts, overhead_s: float
) -> tuple[np.ndarray, float]:
    """How many drafts each candidate gets, and the tokens a second that the step then brings. `chances` by candidate
    as Acceptance gives them; without drafts the step has `num_tokens` and brings a token for each of `num_rows`.
    `overhead_s` is what a step takes beyond its cost."""
    flat = chances.ravel()
    order = np.argsort(-flat, kind="stable")  # a candidate's drafts stay in order
    order = order[: np.count_nonzero(flat)]
    gained = num_rows + np.cumsum(flat[order])
    # Costs grow in steps where shapes are padded, so a draft that does not pay may be followed by one that does.
    rates = gained / (costs.each(num_tokens + 1, len(order)) + overhead_s)
    best_rate, best = num_rows / (costs(num_tokens) + overhead_s), 0
    if len(order) and rates.max() > best_rate:
        best_rate, best = float(rates.max()), int(rates.argmax()) + 1
    return np.bincount(order[:best] // max(1, chances.shape[1]), minlength=len(chances)), best_rate
