"""A proposer that raises, answers amiss or takes too long costs drafts, and never a token of anybody."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import repeat
from typing import Any

import pytest
from drafts_kit import Guesses, alone, drawn_after, engine, message, run, speculating
from engine_kit import VOCAB_SIZE

from anychip.drafts import Draft
from anychip.engine.logits_processors import Restriction
from anychip.request import Request
from anychip.speculation.lengths import StepCosts

PROMPTS = {name: [3 + at, 6] for at, name in enumerate("abcdefgh")}


class Misbehaving(Guesses):
    """Drafts what is right, but that `does` answers in place of the method `where`, for the sequences that began at
    the places `victims`."""

    def __init__(self, where: str, does: Callable[[], Any], victims: tuple[int, ...] = (1,)) -> None:
        super().__init__(random.Random(0), 1.0)
        self.where, self.does, self.victims = where, does, victims
        self.begun = self.asked = 0
        self.drafters: list[Guesses] = []  # of the victims

    def begin(self, owner: str) -> Guesses:
        place, self.begun = self.begun, self.begun + 1
        drafter = super().begin(owner)
        if place in self.victims:
            if self.where == "begin":
                return self._misbehave()
            setattr(drafter, self.where, self._misbehave)
            self.drafters.append(drafter)
        return drafter

    def end(self, drafter: Guesses) -> None:
        if self.where == "end" and any(drafter is each for each in self.drafters):
            self._misbehave()

    def _misbehave(self, *_: object) -> Any:
        self.asked += 1
        return self.does()


def raising(error: BaseException) -> Callable[[], Any]:
    def does() -> Any:
        raise error

    return does


def answers(proposer: Misbehaving, names: str = "ab", **more: Any):
    """Runs the sequences, whose tokens must be right, and returns the core and its device."""
    core, device = engine(speculating(proposer, **more))
    found = run(core, [message(name, PROMPTS[name], 20, stops=()) for name in names])
    assert found == {(name, 0): alone(PROMPTS[name], 0, 20, stops=()) for name in names}
    return core, device


@pytest.mark.parametrize("error", [OSError("no drafts to be had"), SystemExit(1)])
@pytest.mark.parametrize("where", ["begin", "extend", "catch_up", "draft", "end"])
def test_a_proposer_that_raises_costs_its_sequence_the_drafts_alone(where, error, caplog):
    core, device = answers(Misbehaving(where, raising(error)))
    assert device.most_drafts > 1, "the other one's drafts went on"
    assert core.scheduler.stats.speculation.failures == 1
    assert f"goes on without drafts: the proposer raised {type(error).__name__}" in caplog.text


class Broken:
    """A number that cannot be read."""

    def __index__(self) -> int:
        raise KeyError("no number")

    def __repr__(self) -> str:
        return "Broken"


@pytest.mark.parametrize(
    ("where", "answer"),
    [
        ("begin", None),
        ("catch_up", None),
        ("catch_up", -1),
        ("catch_up", 10**6),
        ("draft", None),
        ("draft", "text"),
        ("draft", ([5], 3)),
        ("draft", Draft(["5"], 3)),
        ("draft", Draft([5.0], 3)),
        ("draft", Draft(None, 3)),
        ("draft", Draft([5], "3")),
        ("draft", Draft([5, -1], 3)),
        ("draft", Draft([VOCAB_SIZE], 3)),
        ("draft", Draft([2**31], 3)),
        ("draft", Draft([-(2**70)], 3)),
        ("draft", Draft([Broken()], 3)),
        ("draft", Draft([5], Broken())),
        ("catch_up", 2.0),
    ],
    ids=repr,
)
def test_what_is_no_draft_costs_its_sequence_the_drafts_alone(where, answer, caplog):
    """Ids that no token has among them: devices read memory by them."""
    core, device = answers(Misbehaving(where, lambda: answer))
    assert device.most_drafts > 1, "the other one's drafts went on"
    assert core.scheduler.stats.speculation.failures == 1
    assert "request b goes on without drafts: the proposer raised" in caplog.text


def test_a_draft_without_end_is_cut():
    core, device = answers(Misbehaving("draft", lambda: Draft(repeat(5), 3)), max_drafts=4)
    assert device.most_drafts == 4 and core.scheduler.stats.speculation.failures == 0


def test_a_proposer_that_is_sure_of_itself_is_judged_by_its_drafts_all_the_same():
    """Only a grammar is sure: wrong drafts that claim to be are fewer and fewer."""
    proposer = Misbehaving("draft", lambda: Draft([999] * 4, 10**9), victims=(0,))
    core, _ = answers(proposer, "a", costs=StepCosts([(1, 0.01), (9, 0.03)]))
    assert core.scheduler.stats.speculation.drafted < 20


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], Any]:
        """What answers with no draft, so much later."""

        def does() -> Draft:
            self.now += seconds
            return Draft((), 0)

        return does


@pytest.mark.parametrize("where", ["begin", "extend", "draft", "end"])
def test_a_sequence_whose_drafter_takes_too_long_is_not_guessed_any_more(where, caplog):
    clock = Clock()
    proposer = Misbehaving(where, clock.takes(1.5))
    core, device = answers(proposer, clock=clock)
    assert proposer.asked == 1 and device.most_drafts > 1
    assert core.scheduler.stats.speculation.failures == 1
    assert "request b goes on without drafts: a call of the proposer took 1.5 seconds, 1 at most" in caplog.text


def test_after_three_late_calls_the_proposer_is_not_asked_any_more(caplog):
    """For the sequences that run, and for those that come."""
    clock = Clock()
    proposer = Misbehaving("draft", clock.takes(60.0), victims=(0, 1, 2, 3))
    core, device = answers(proposer, "abcdefgh", clock=clock)
    assert proposer.asked == 3 and device.most_drafts == 0 and clock.now == 180.0
    assert core.scheduler.stats.speculation.failures == 3
    assert "3 calls of the proposer took too long: it is not asked any more" in caplog.text
    begun = proposer.begun
    run(core, [message("later", [5, 6], 20)])
    assert proposer.begun == begun and core.scheduler.stats.speculation.failures == 3


def test_calls_that_are_quick_enough_are_never_too_many():
    clock = Clock()
    core, device = answers(Misbehaving("draft", clock.takes(0.9), victims=(0, 1)), "abc", clock=clock)
    assert clock.now > 10 and device.most_drafts > 1
    assert core.scheduler.stats.speculation.failures == 0


def test_the_first_failure_alone_is_logged_with_its_traceback(caplog):
    core, _ = answers(Misbehaving("draft", raising(OSError("none to be had")), victims=(0, 1, 2)), "abcd")
    lines = [record for record in caplog.records if "goes on without drafts" in record.message]
    assert [bool(line.exc_info) for line in lines] == [True, False, False]
    assert lines[2].message.endswith("goes on without drafts: the proposer raised OSError: none to be had (failure 3)")
    assert core.scheduler.stats.speculation.failures == 3


class Forcing(Restriction):
    """A grammar that leaves no choice about the next two tokens."""

    name = "the grammar"

    def applies(self, position: int) -> bool:
        return False

    def forced(self, request: Request) -> list[int]:
        ids = request.token_ids
        for _ in range(2):
            ids.append(drawn_after(ids, 0))
        return ids[-2:]


@pytest.mark.parametrize("where", ["extend", "catch_up", "draft"])
def test_a_sequence_that_lost_its_proposer_keeps_what_its_grammar_forces(where):
    core, device = engine(speculating(Misbehaving(where, raising(OSError("none to be had")), victims=(0,))))
    core.add(message("a", PROMPTS["a"], 20, stops=()))
    (request,) = core.scheduler.sequences("a")
    request.processors = (Forcing(),)
    assert run(core, []) == {("a", 0): alone(PROMPTS["a"], 0, 20, stops=())}
    stats = core.scheduler.stats
    # Who is forced is not asked, so that what would raise in `draft` is not called.
    assert stats.speculation.failures == (where != "draft") and device.most_drafts == 2
    assert stats.speculation.accepted == stats.speculation.drafted >= 12 and stats.steps <= 8
