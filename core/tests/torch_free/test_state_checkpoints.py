"""States in the prefix cache: where chunks end, what is found again, and who works on a copy."""

from __future__ import annotations

import random
from array import array

import pytest
from engine_kit import answer, make_request, make_scheduler, run_to_end

from anychip.kv_cache import checkpoints
from anychip.worker_report import KVGroup, StateGroup

BLOCK = 4
HYBRID = (KVGroup(block_size=BLOCK), StateGroup())
WINDOWED = (KVGroup(block_size=BLOCK), KVGroup(block_size=BLOCK, window=6), StateGroup())
ALONE = (StateGroup(),)
PROMPT = list(range(10, 32))


def scheduler_of(groups=HYBRID, **settings):
    return make_scheduler(**{"groups": groups, "prefix_caching": True, "num_states": 12, "budget": 64, **settings})


def counts(step) -> list[int]:
    return array("i", step.decision.num_tokens).tolist()


def computed(scheduler, request) -> list[int]:
    """The chunks of a request that runs alone, to its end."""
    scheduler.add(request)
    chunks = []
    while (step := scheduler.schedule()) is not None:
        chunks += counts(step)
        answer(scheduler, step)
    return chunks


def run_all(scheduler, *requests) -> None:
    for request in requests:
        scheduler.add(request)
    run_to_end(scheduler)


def test_a_chunk_ends_at_the_last_full_block_of_a_prompt():
    assert computed(scheduler_of(), make_request("a", PROMPT, max_output=1)) == [20, 2]
    assert computed(scheduler_of(), make_request("a", PROMPT[:20], max_output=1)) == [16, 4]
    assert computed(scheduler_of(prefix_caching=False), make_request("a", PROMPT, max_output=1)) == [22]


def test_a_long_prompt_leaves_states_on_its_way(monkeypatch):
    monkeypatch.setattr(checkpoints, "EVERY", 12)
    assert computed(scheduler_of(), make_request("a", PROMPT, max_output=1)) == [12, 8, 2]


@pytest.mark.parametrize("groups", [HYBRID, WINDOWED, ALONE])
def test_a_prompt_goes_on_from_where_another_one_left_a_state(groups):
    size = 16 if groups == ALONE else BLOCK
    prompt = list(range(10, 10 + 5 * size + 2))
    scheduler = scheduler_of(groups, budget=128)
    run_all(scheduler, make_request("a", prompt, arrival=1, max_output=3))
    longer = make_request("b", [*prompt, *range(200, 230)], arrival=2, max_output=3)
    scheduler.add(longer)
    step = scheduler.schedule()
    assert longer.cached_tokens == 5 * size
    ((source, copy),) = step.decision.state_copies
    assert source != copy == longer.block_ids[-1][0]
    answer(scheduler, step)
    run_to_end(scheduler)
    scheduler.kv.check_integrity([])


def test_who_goes_on_from_its_own_state_leaves_it_as_it_was():
    scheduler = scheduler_of()
    request = make_request("a", PROMPT, max_output=3)
    scheduler.add(request)
    first = scheduler.schedule()
    (kept,) = request.block_ids[1]
    second = scheduler.schedule()
    (own,) = request.block_ids[1]
    assert second.decision.state_copies == [(kept, own)]
    changes = list(array("i", second.decision.new_blocks))
    assert [request.slot, 1, 0, own] in [changes[at : at + 4] for at in range(0, len(changes), 4)]
    for step in (first, second):
        answer(scheduler, step)
    run_to_end(scheduler)


def test_where_prompts_part_the_second_leaves_a_state_for_the_third():
    scheduler, shared = scheduler_of(), PROMPT[:13]
    found = []
    for at in (1, 2, 3):
        request = make_request(f"r{at}", [*shared, *range(100 * at, 100 * at + 9)], arrival=at, max_output=1)
        chunks = computed(scheduler, request)
        found.append((request.cached_tokens, chunks))
    assert found == [(0, [20, 2]), (0, [12, 8, 2]), (12, [8, 2])]


def test_where_prompts_part_a_model_of_states_alone_leaves_one_too():
    """It keeps no blocks of tokens. What it has seen of prompts tells where they part."""
    scheduler, shared, found = scheduler_of(ALONE, budget=256), list(range(10, 10 + 53)), []
    for at in (1, 2, 3):
        request = make_request(f"r{at}", [*shared, *range(100 * at, 100 * at + 30)], arrival=at, max_output=1)
        chunks = computed(scheduler, request)
        found.append((request.cached_tokens, chunks))
    assert found == [(0, [80, 3]), (0, [48, 32, 3]), (48, [32, 3])]


def test_the_pool_of_states_is_counted_apart_from_that_of_tokens():
    scheduler = scheduler_of()
    scheduler.add(make_request("a", PROMPT, max_output=2))
    answer(scheduler, scheduler.schedule())
    held = scheduler.stats
    assert (held.states_used, held.states) == (1, 11)
    run_to_end(scheduler)
    assert scheduler.stats.states_used == 0, "what the prefix cache keeps may be taken"
    alone = make_scheduler().stats
    assert (alone.states_used, alone.states) == (0, 0)


def test_what_is_remembered_of_prompts_has_a_bound(monkeypatch):
    monkeypatch.setattr(checkpoints, "MOST_SEEN", 3)
    scheduler, shared = scheduler_of(ALONE, budget=256), list(range(10, 10 + 53))
    computed(scheduler, make_request("a", [*shared, *range(100, 130)], max_output=1))
    request = make_request("b", [*shared, *range(200, 230)], arrival=1, max_output=1)
    assert computed(scheduler, request) == [80, 3], "the first blocks of the first prompt are forgotten"


@pytest.mark.parametrize(("steps", "kept"), [(1, 20), (2, 20), (3, 20), (4, 24), (5, 20)])
def test_a_preempted_request_goes_on_from_its_last_state(steps, kept):
    """That of its prompt, or the one that preemption finds at the end of a block."""
    scheduler = scheduler_of()
    request = make_request("a", PROMPT, max_output=9)
    scheduler.add(request)
    for _ in range(steps):
        answer(scheduler, scheduler.schedule())
    scheduler.preempt(request)
    step = scheduler.schedule()
    assert request.num_computed == kept + counts(step)[0]
    assert len(step.decision.state_copies) == 1
    answer(scheduler, step)
    run_to_end(scheduler)


def test_forks_wait_and_go_on_from_their_parents_state():
    scheduler = scheduler_of()
    parent = make_request("p", PROMPT, arrival=1, max_output=3)
    child = make_request("c", PROMPT, arrival=2, fork_of=parent, max_output=3)
    scheduler.add(parent)
    scheduler.add(child)
    while child.slot is None:
        answer(scheduler, scheduler.schedule())
    assert child.cached_tokens == 20
    assert child.block_ids[1] != parent.block_ids[1]
    run_to_end(scheduler)


def test_without_a_free_block_a_sequence_takes_its_state_back():
    scheduler = scheduler_of(num_states=2, max_num_seqs=1)
    assert computed(scheduler, make_request("a", PROMPT, max_output=3)) == [20, 2, 1, 1]
    again = make_request("b", PROMPT, arrival=2, max_output=1)
    assert computed(scheduler, again) == [20, 2], "its state was taken back"
    assert scheduler.num_preemptions == 0


def test_other_weights_find_no_state():
    scheduler = scheduler_of()
    run_all(scheduler, make_request("a", PROMPT, arrival=1))
    scheduler.weights_changed()
    again = make_request("b", PROMPT, arrival=2)
    run_all(scheduler, again)
    assert again.cached_tokens == 0


@pytest.mark.parametrize("seed", range(12))
def test_books_stay_right_whatever_happens(seed):
    """Requests that share beginnings come, are preempted and aborted, with several steps in flight."""
    rng = random.Random(seed)
    groups = rng.choice([HYBRID, WINDOWED, ALONE])
    scheduler = scheduler_of(groups, budget=rng.choice([5, 24]), num_states=rng.choice([4, 7, 12]), max_num_seqs=3)
    flight, base, arrived = [], list(range(1, 80)), 0
    for _ in range(120):
        what = rng.random()
        if what < 0.25:
            arrived += 1
            prompt = [*base[: rng.randrange(1, 60)], *[rng.randrange(100, 200) for _ in range(rng.randrange(0, 9))]]
            scheduler.add(make_request(f"r{arrived}", prompt, arrival=arrived, max_output=rng.randrange(1, 20)))
        elif what < 0.32 and scheduler.running:
            scheduler.preempt(rng.choice(scheduler.running))
        elif what < 0.36 and scheduler.running:
            victim = rng.choice(scheduler.running)
            scheduler.abort(victim.request_id, victim.index)
        if len(flight) < 2 and (step := scheduler.schedule()) is not None:
            flight.append(step)
        if flight and (len(flight) == 2 or rng.random() < 0.5):
            answer(scheduler, flight.pop(0))
        alive = [one for sequences in scheduler.requests.values() for one in sequences.values()]
        scheduler.kv.check_integrity(alive)
    for step in flight:
        answer(scheduler, step)
    run_to_end(scheduler)
    scheduler.kv.check_integrity([])
