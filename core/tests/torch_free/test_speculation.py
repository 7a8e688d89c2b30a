"""Drafts change no token: whatever is drafted, every sequence is the one that is drawn without drafts, and the prefix
cache offers what was drawn alone."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from drafts_kit import WORKLOADS, Guesses, alone, engine, message, run, speculating
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.request import Request
from anychip.scheduler.scheduler import Scheduler
from anychip.scheduler.step import ScheduledStep
from anychip.speculation import asking
from anychip.speculation.lengths import StepCosts
from anychip.speculation.proposer import make_proposer
from anychip.speculation.speculator import Speculator
from anychip.worker_report import DeviceRules, KVGroup


def offers_of(scheduler: Scheduler) -> dict[int, list[int]]:
    """Filled, from now on, with the tokens under which each block is offered."""
    offered: dict[int, list[int]] = {}
    kv, pool, current = scheduler.kv, scheduler.kv.pool, list[Request]()
    kv_offer, pool_offer, allocate = kv.offer, pool.offer, pool.allocate

    def offer(request: Request) -> None:
        current[:] = [request]
        kv_offer(request)

    def offered_as(key: bytes, block: int) -> None:
        pool_offer(key, block)
        if pool._key_of[block] == key:
            (request,) = current
            size, at = kv.groups[0].block_size, request.block_ids[0].index(block)
            offered[block] = request.token_ids[at * size : (at + 1) * size]

    def handed_out(count: int) -> list[int]:
        blocks = allocate(count)
        for block in blocks:
            offered.pop(block, None)
        return blocks

    kv.offer, pool.offer, pool.allocate = offer, offered_as, handed_out
    return offered


@settings(max_examples=150, deadline=None)
@given(
    **WORKLOADS,
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_sequence_is_what_is_drawn_without_drafts(
    prompts, max_output, n, right, max_drafts, num_blocks, budget, max_in_flight, whole, seed
):
    """Blocks are short in some, so that sequences are preempted with drafts in flight."""
    guesses = Guesses(random.Random(seed), right)
    speculator = speculating(guesses, max_drafts=max_drafts)
    core, device = engine(speculator, num_blocks=num_blocks, budget=budget, max_in_flight=max_in_flight)
    offered = offers_of(core.scheduler)

    def check() -> None:
        if max_in_flight == 1:
            device.check_offers(offered)
        held = [request for each in core.scheduler.requests.values() for request in each.values()]
        core.scheduler.kv.check_integrity([request for request in held if request.block_ids])
        if not core.in_flight:
            size = core.scheduler.kv.groups[0].block_size
            for request in held:
                blocks = len(request.block_ids[0]) if request.block_ids else 0
                assert blocks <= max(request.num_computed, request.num_known - 1) // size + 1, "drafts keep blocks"

    messages = [message(str(at), prompt, max_output, n) for at, prompt in enumerate(prompts)]
    found = run(core, [msgspec.structs.replace(one, whole=whole) for one in messages], check)
    for (name, index), tokens in found.items():
        assert tokens == alone(prompts[int(name)], index, max_output), (name, index)
    assert len(found) == len(prompts) * n
    pool = core.scheduler.kv.pool
    assert pool.num_free == pool.num_usable and device.most_drafts <= max_drafts


def test_right_drafts_save_steps():
    long = message("a", [5, 6, 7], 30, stops=())
    core, device = engine(speculating(Guesses(random.Random(0), 1.0)), max_in_flight=2)
    run(core, [long])
    stats = core.scheduler.stats
    assert stats.steps < 18 and device.most_drafts == 4
    assert stats.speculation.accepted == stats.speculation.drafted > 12


def test_drafts_take_no_block_from_a_sequence_and_keep_none_that_they_do_not_need():
    """A pool in which both sequences just fit: with drafts, nobody is preempted more often."""
    messages = [message(name, [3, 4, 5, 6], 21) for name in "ab"]

    def preemptions(speculator: Speculator | None) -> int:
        core, _ = engine(speculator, num_blocks=15, prefix_caching=False)
        run(core, messages)
        return core.scheduler.stats.preemptions

    wrong = speculating(Guesses(random.Random(1), 0.0), max_drafts=6)
    assert preemptions(wrong) == preemptions(None) == 0


@pytest.mark.parametrize("rules", [DeviceRules(takes_drafts=False), DeviceRules(max_padded_tokens=8)])
def test_drafts_obey_the_devices_rules(rules):
    core, device = engine(speculating(Guesses(random.Random(3), 1.0), max_drafts=6), rules=rules)
    schedule = core.scheduler.schedule

    def watched() -> ScheduledStep | None:
        step = schedule()
        if step is not None and rules.max_padded_tokens:
            counts = memoryview(step.decision.num_tokens).cast("i")
            assert len(counts) * max(counts) <= rules.max_padded_tokens
        return step

    core.scheduler.schedule = watched
    found = run(core, [message("a", [5, 6], 20), message("b", [5], 20)])
    assert found["a", 0] == alone([5, 6], 0, 20) and found["b", 0] == alone([5], 0, 20)
    assert (device.most_drafts > 0) == rules.takes_drafts


def test_steps_are_not_overlapped_for_drafts_that_do_not_pay():
    """A step of two tokens takes ten times as long: the second step is launched while the first one runs."""
    costs = StepCosts([(1, 0.001), (2, 0.01), (64, 0.32)])
    core, device = engine(speculating(Guesses(random.Random(0), 0.5), costs=costs), max_in_flight=2)
    collect, overlapped = core.executor.collect, []
    core.executor.collect = lambda: (overlapped.append(len(device.pending)), collect())[1]
    run(core, [message("a", [5, 6], 25, stops=())])
    assert overlapped == [2] * 24 + [1] and device.most_drafts == 0


@pytest.mark.parametrize(("second", "drafts"), [(0.0199, False), (0.015, True)])
def test_drafts_that_are_hardly_worth_it_are_not_tried(second, drafts):
    """Two tokens that are sure take as long as two steps, but for a hair; or much less."""
    costs = StepCosts([(1, 0.01), (2, second), (64, 62 * second)])
    speculator = speculating(Guesses(random.Random(0), 1.0), max_drafts=1, costs=costs)
    speculator.acceptance.chances = lambda evidence, counts, own: (np.arange(1) < counts[:, None]).astype(float)
    core, device = engine(speculator)
    run(core, [message("a", [5, 6], 20, stops=())])
    assert (device.most_drafts > 0) == drafts


class Clock:
    """A millisecond passes whenever somebody looks at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def test_idle_time_between_requests_is_no_cost_of_drafts():
    clock, costs = Clock(), StepCosts([(1, 0.01), (64, 0.011)])
    speculator = speculating(Guesses(random.Random(0), 1.0), costs=costs, clock=clock)
    core, device = engine(speculator)
    for name in "abcdefghijk":
        run(core, [message(name, [5, 6], 20, stops=())])
        clock.now += 60  # the engine has nothing to do for a minute
    assert speculator._overhead_s < 0.01 and device.most_drafts == 4


def test_host_time_longer_than_a_step_is_a_cost_of_drafts_and_once_is_not_always():
    """A host that takes three steps' time after each step with drafts; and one that did so once, for a minute."""
    clock, costs = Clock(), StepCosts([(1, 0.01), (64, 0.011)])
    speculator = speculating(Guesses(random.Random(0), 1.0), costs=costs, clock=clock)
    core, _ = engine(speculator)
    core.add(message("a", [5, 6], 20))
    for _ in range(200):
        speculator.taken_in(1, 5, 5)
        clock.now += 0.03
        speculator._note_overhead()
    assert speculator._overhead_s == pytest.approx(0.03, rel=0.1)
    speculator._taken_in_at = clock.now - 60
    speculator._note_overhead()
    assert speculator._overhead_s < 0.05


def test_what_drafts_saved_counts_what_their_tokens_cost():
    """Each draft costs half of a step of its own, and all are right."""
    speculator = speculating(Guesses(random.Random(0), 1.0), costs=StepCosts([(1, 0.01), (9, 0.05)]))
    core, _ = engine(speculator)
    run(core, [message("a", [5, 6], 30, stops=())])
    stats = core.scheduler.stats.speculation
    assert stats.accepted == stats.drafted > 10
    assert stats.saved_s == pytest.approx(0.005 * stats.accepted, rel=0.3)


@pytest.mark.parametrize(
    ("tenant", "salt", "drafts"),
    [("one", "a", True), ("two", "a", False), ("one", "b", False), ("one", "", False), ("one a", "", False)],
)
def test_nobody_sees_the_text_of_another_tenant_or_salt_in_drafts(tenant, salt, drafts):
    core, device = engine(speculating(make_proposer("suffix", {}), max_drafts=6))
    prompt = [5, 6, 7, 8]
    run(core, [message("a", prompt, 25, tenant="one", cache_salt="a")])
    assert device.most_drafts == 0, "nothing in the sequence stood there before"
    core.add(message("b", [*prompt, *alone(prompt, 0, 25)[:3]], 4, tenant=tenant, cache_salt=salt))
    while core.has_work:
        core.step()
    assert (device.most_drafts > 0) == drafts


def test_the_only_draft_of_a_step_is_worth_waiting_for():
    """With drafts of one token, the step in flight draws the first token that is guessed, and the draft is the next."""
    speculator = speculating(Guesses(random.Random(0), 1.0), max_drafts=1, costs=StepCosts([(1, 1.0), (64, 1.1)]))
    core, device = engine(speculator, max_in_flight=2)
    run(core, [message("a", [5, 6], 30, stops=())])
    assert device.most_drafts == 1 and core.scheduler.stats.speculation.accepted > 5


def test_a_long_prompt_is_taken_in_by_parts_and_what_was_drawn_at_once(monkeypatch):
    """However many sequences decode, the prompt gets its part, and however long it is, they get theirs."""
    monkeypatch.setattr(asking, "_TAKEN_IN", 6)
    taken: dict[int, list[int]] = {}

    class Watched(Guesses):
        def begin(self, owner: str) -> Guesses:
            return Watched(self.rng, self.right)

        def catch_up(self, most: int) -> int:
            taken.setdefault(id(self), []).append(most)
            return most

    proposer = Watched(random.Random(0), 1.0)
    core, _ = engine(speculating(proposer, max_drafts=2), num_blocks=100)
    run(core, [message(name, [5, 6], 20, stops=()) for name in "abcd"] + [message("long", [7] * 40, 12, stops=())])
    *short, long = taken.values()
    assert long[:6] == [6] * 6 and max(long) <= 6
    assert all(sum(each) >= 18 for each in short), "but for what was drawn last"


def test_a_proposer_that_does_not_exist_is_refused_by_name():
    there_are = "auto, draft:MODEL, eagle:HEAD, medusa:HEADS, mtp, ngram, suffix"
    with pytest.raises(ConfigError, match=f"--speculate crystal-ball: no such proposer; there are {there_are}"):
        make_proposer("crystal-ball", {})
    with pytest.raises(ConfigError, match="max_drafts is 0; expected 1 or more"):
        EngineConfig(max_drafts=0)


def test_windows_and_several_groups_keep_their_blocks_right():
    groups = (KVGroup(block_size=4), KVGroup(block_size=4, window=6))
    core, _ = engine(speculating(Guesses(random.Random(5), 0.8), max_drafts=5), groups=groups, num_blocks=60)

    def check() -> None:
        held = [request for each in core.scheduler.requests.values() for request in each.values()]
        core.scheduler.kv.check_integrity([request for request in held if request.block_ids])

    found = run(core, [message(str(at), [3 + at, 5, 6], 25) for at in range(3)], check)
    assert all(tokens == alone([3 + int(name), 5, 6], 0, 25) for (name, _), tokens in found.items())
