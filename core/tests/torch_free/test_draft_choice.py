"""What is drafted, against a search of everything; how much of it, against every other choice."""

from __future__ import annotations

import itertools
import math
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.speculation.lengths import Acceptance, StepCosts, choose_lengths, newer_rates
from anychip.speculation.proposer import make_proposer
from anychip.speculation.text_index import EarlierOutputs, TextIndex

TEXT = st.lists(st.integers(0, 3), max_size=60)


def longest(text: list[int], tail: list[int], *, before: int) -> int:
    """Of the matches of the tail's end in text[:before], by trying every place."""
    found = 0
    for end in range(before + 1):
        length = 0
        while length < min(end, len(tail)) and text[end - 1 - length] == tail[-1 - length]:
            length += 1
        found = max(found, length)
    return min(found, 32)


@settings(max_examples=300, deadline=None)
@given(text=TEXT, other=TEXT, parts=st.lists(st.integers(1, 9), max_size=12))
def test_the_longest_match_is_found_and_what_followed_it(text, other, parts):
    index, at = TextIndex(), 0
    for part in [*parts, len(text)]:
        index.extend(text[at : at + part])
        at += part
    expected = longest(text, text, before=len(text) - 1) if text else 0
    own = index.find_own(most_places=1000)
    assert own.length == (expected if expected >= 3 else 0)
    if own.length:
        assert own.end < len(text) and text[own.end - own.length : own.end] == text[len(text) - own.length :]
        assert index.continued(own.end, 4)[: len(text) - own.end] == text[own.end : own.end + 4]
    found = index.find(other, most_places=1000)
    expected = longest(text, other, before=len(text))
    assert found.length == (expected if expected >= 3 else 0)
    assert text[found.end - found.length : found.end] == other[len(other) - found.length :]


def test_a_loop_goes_on_beyond_the_end_of_the_text():
    index = TextIndex()
    index.extend([5, 6, 7, 5, 6, 7, 5])
    match = index.find_own(most_places=8)
    assert index.continued(match.end, 7) == [6, 7, 5, 6, 7, 5, 6]


def test_a_match_does_not_reach_from_one_output_into_the_next():
    earlier = EarlierOutputs()
    earlier.add([1, 2, 3, 4])
    earlier.add([5, 6])
    assert list(earlier.draft([2, 3, 4], 4).token_ids) == []
    assert list(earlier.draft([1, 2, 3], 4).token_ids) == [4]
    assert not earlier.draft([4, 5, 6], 4).evidence


def test_old_outputs_are_forgotten(monkeypatch):
    monkeypatch.setattr("anychip.speculation.text_index._EARLIER_TOKENS", 20)
    earlier = EarlierOutputs()
    for start in range(0, 100, 10):
        earlier.add(range(start, start + 10))
    assert earlier.draft([91, 92, 93], 2).evidence == 3 and earlier.draft([1, 2, 3], 2).evidence == 0
    assert len(earlier.newer.token_ids) + len(earlier.older.token_ids) <= 44


@pytest.mark.parametrize("name", ["ngram", "suffix"])
def test_a_long_prompt_is_taken_in_by_parts(name):
    drafter = make_proposer(name, {}).begin("")
    drafter.extend(memoryview(array("i", [1, 2, 3, 4, 5] * 3)))
    assert [drafter.catch_up(6) for _ in range(4)] == [6, 6, 3, 0]
    assert list(drafter.draft(3).token_ids) == [1, 2, 3]


@settings(max_examples=200, deadline=None)
@given(
    chances=st.lists(st.lists(st.floats(0.05, 0.99), max_size=3), min_size=1, max_size=3),
    slope=st.floats(0.0, 1.0),
    overhead=st.floats(0.0, 1.0),
)
def test_where_costs_grow_evenly_no_other_lengths_are_better(chances, slope, overhead):
    chances = [list(itertools.accumulate(each, lambda a, b: a * b)) for each in chances]
    rows = len(chances)
    costs = StepCosts([(1, 1.0), (2, 1.0 + slope), (64, 1.0 + 63 * slope)])

    def rate(lengths) -> float:
        gained = rows + sum(sum(each[:count]) for each, count in zip(chances, lengths, strict=True))
        return gained / (costs(rows + sum(lengths)) + overhead)

    padded = np.array([[*each, *[0.0] * (3 - len(each))] for each in chances])
    lengths, found = choose_lengths(padded, num_rows=rows, num_tokens=rows, costs=costs, overhead_s=overhead)
    best = max(map(rate, itertools.product(*[range(len(each) + 1) for each in chances])))
    assert found == pytest.approx(rate(lengths)) and found == pytest.approx(best)


def test_costs_between_and_beyond_what_was_measured():
    costs = StepCosts([(1, 2.0), (4, 5.0), (8, 4.0)])
    assert [costs(n) for n in (1, 2.5, 4, 6, 8)] == [2.0, 3.0, 4.0, 4.0, 4.0], "a larger step is never cheaper"
    assert StepCosts([(2, 1.0), (4, 3.0)])(8) == pytest.approx(7.0) and StepCosts([(4, 2.0)])(8) == pytest.approx(4.0)
    assert costs.each(2, 9).tolist() == pytest.approx([costs(n) for n in range(2, 11)])


def several(*values: float) -> np.ndarray:
    return np.array(values)


def test_acceptance_follows_what_was_drawn_and_is_forgotten():
    acceptance, before = Acceptance(), Acceptance().rate(10)
    for _ in range(300):
        acceptance.add(several(10), num_drafts=several(1), num_drawn=several(0))
    assert acceptance.rate(10) < 0.1 < before and acceptance.rate(3) == Acceptance().rate(3)
    for _ in range(10):
        acceptance.forget()
    assert acceptance.rate(10) == pytest.approx(before, abs=0.05)
    (chances,) = acceptance.chances(several(32), several(3), own=several(math.nan)).tolist()
    assert chances == sorted(chances, reverse=True) and len(chances) == 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=20))
def test_many_sequences_are_judged_at_once_as_one_by_one(judged):
    rows = np.array([(evidence, count, min(drawn, count)) for evidence, count, drawn in judged])
    at_once, one_by_one = Acceptance(), Acceptance()
    at_once.add(*rows.T)
    own = newer_rates(np.full(len(rows), 0.5), rows[:, 1], rows[:, 2])
    for place, row in enumerate(rows):
        one_by_one.add(*row[:, None])
        rate = 0.5
        for at in range(min(row[1], row[2] + 1)):
            rate += 0.1 * ((at < row[2]) - rate)
        assert own[place] == pytest.approx(rate)
    for evidence in range(65):
        assert at_once.rate(evidence) == pytest.approx(one_by_one.rate(evidence), rel=0.02)
    assert newer_rates(several(math.nan, math.nan, math.nan), several(4, 4, 1), several(4, 2, 0)).tolist() == (
        pytest.approx([1.0, 0.9, 0.0])
    )
    chances = at_once.chances(rows[:, 0], rows[:, 1], np.where(rows[:, 2] > 0, own, np.nan))
    for place, (evidence, count, drawn) in enumerate(rows.tolist()):
        rates = [at_once.rate(evidence + at) for at in range(count)]
        mine = [(rate + own[place]) / 2 if drawn else rate for rate in rates]
        assert chances[place, :count] == pytest.approx(np.cumprod(mine)) and not chances[place, count:].any()
