"""Under any rules of a device, limits and requests: either they are refused at the start, or the work comes to its end,
every step keeps the rules, and the KV cache's books are right after each."""

from __future__ import annotations

import pytest
from engine_kit import add_message, answer, counts, make_core, make_request, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.errors import ConfigError, InvalidRequest
from anychip.kv_cache.hashing import prompt_hashes
from anychip.prefix import PrefixRoot
from anychip.request import RequestStatus
from anychip.scheduler.policy import FairPolicy, PriorityPolicy, SchedulingPolicy
from anychip.worker_report import DeviceRules, KVGroup, StateGroup

some = st.one_of(st.none(), st.integers(0, 12))
RULES = st.builds(
    DeviceRules,
    mix_prefill_decode=st.booleans(),
    max_prefills=some,
    chunk_multiple=st.sampled_from([1, 1, 2, 4, 8]),
    max_tokens=some,
    max_rows=some,
    max_padded_tokens=st.one_of(st.none(), st.integers(0, 40)),
)
GROUPS = st.sampled_from(
    [
        (KVGroup(4),),
        (KVGroup(4), KVGroup(4, window=6)),
        (KVGroup(8), KVGroup(4, window=5)),
        (KVGroup(4, window=5),),
        (KVGroup(4), StateGroup()),
        (StateGroup(),),
    ]
)
REQUESTS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 6), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=8
)


def keeps(rules: DeviceRules, sizes: list[int], behind: list[int], budget: int) -> None:
    assert sum(sizes) <= min(budget, rules.max_tokens or budget)
    assert rules.max_rows is None or len(sizes) <= rules.max_rows
    assert rules.max_prefills is None or sum(size > 1 for size in sizes) <= rules.max_prefills
    assert rules.max_padded_tokens is None or len(sizes) * max(sizes) <= rules.max_padded_tokens
    assert rules.mix_prefill_decode or len({size > 1 for size in sizes}) == 1
    for size, left in zip(sizes, behind, strict=True):
        assert size == left or size % rules.chunk_multiple == 0


@settings(max_examples=150, deadline=None)
@given(
    rules=RULES,
    budget=st.integers(1, 24),
    slots=st.integers(1, 4),
    requests=REQUESTS,
    groups=GROUPS,
    caching=st.booleans(),
    policy=st.sampled_from([SchedulingPolicy, PriorityPolicy, FairPolicy]),
    depth=st.integers(1, 3),
    blocks=st.integers(22, 40),
)
def test_work_that_is_accepted_comes_to_its_end(rules, budget, slots, requests, groups, caching, policy, depth, blocks):
    options = {"rules": rules, "budget": budget, "max_num_seqs": slots, "groups": groups, "num_blocks": blocks}
    try:
        scheduler = make_scheduler(prefix_caching=caching, policy=policy(), **options)
    except ConfigError:
        low = [rules.max_prefills, rules.max_tokens, rules.max_rows, rules.max_padded_tokens]
        room = min(value for value in (budget, rules.max_tokens, rules.max_padded_tokens) if value is not None)
        assert 0 in low or rules.chunk_multiple > room
        return
    made = []
    for number, (length, output, priority, kind) in enumerate(requests):
        prompt = [number * 7 + 3] * length if kind == 0 else list(range(100, 100 + length))
        parent = made[-1] if kind == 2 and made and made[-1].prompt == make_request("", prompt).prompt else None
        request = make_request(
            str(number), prompt, max_output=output, arrival=number, priority=priority, fork_of=parent, tenant=str(kind)
        )
        made.append(request)
        scheduler.add(request)
    in_flight = []
    for _ in range(2000):
        step = scheduler.schedule() if len(in_flight) < depth else None
        if step is not None:
            in_flight.append(step)
            sizes = counts(step.decision)
            starts = [request.num_computed - size for request, size in zip(step.requests, sizes, strict=True)]
            behind = [
                max(size, request.num_known - start)
                for request, size, start in zip(step.requests, sizes, starts, strict=True)
            ]
            keeps(rules, sizes, behind, budget)
        elif in_flight:
            answer(scheduler, in_flight.pop(0))
        elif not scheduler.has_work:
            break
        scheduler.kv.check_integrity(scheduler.running)
    assert all(request.status is RequestStatus.FINISHED for request in made)
    scheduler.kv.check_integrity([])


def test_a_chunk_that_no_step_holds_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"multiple of 64 tokens, and a step holds 48 at most \(max_num_batched_tok"):
        make_scheduler(budget=48, rules=DeviceRules(chunk_multiple=64))


def test_a_request_that_the_cache_can_never_hold_is_refused():
    core = make_core(make_scheduler(num_blocks=8))
    with pytest.raises(InvalidRequest, match="32 tokens take 8 KV blocks, there are 7"):
        core.add(add_message("a", [5] * 20, max_output=12))


def test_where_prefills_and_decodes_do_not_mix_a_hit_with_one_token_left_runs_with_the_decodes():
    scheduler = make_scheduler(rules=DeviceRules(mix_prefill_decode=False))
    prompt = list(range(10, 19))
    scheduler.add(make_request("a", prompt, arrival=1, max_output=1))
    answer(scheduler, scheduler.schedule())
    scheduler.add(make_request("b", list(range(30, 40)), arrival=2))
    scheduler.add(make_request("c", prompt, arrival=3))
    assert counts(scheduler.schedule().decision) == [10]
    assert counts(scheduler.schedule().decision) == [1, 1]


def test_an_urgent_long_prompt_does_not_stop_those_who_decode():
    scheduler = make_scheduler(budget=8, policy=PriorityPolicy())
    for name in ("a", "b"):
        scheduler.add(make_request(name, [5, 6], priority=9, max_output=9))
    answer(scheduler, scheduler.schedule())
    scheduler.add(make_request("urgent", list(range(30, 60)), priority=0))
    for _ in range(4):
        step = scheduler.schedule()
        assert counts(step.decision) == [1, 1, 6]
        answer(scheduler, step)


def test_a_blocked_head_is_looked_up_once_until_a_block_returns():
    scheduler = make_scheduler(num_blocks=12)
    scheduler.add(make_request("a", list(range(10, 30)), max_output=12, arrival=1))
    answer(scheduler, scheduler.schedule())
    looked = []
    find = scheduler.kv.find_shared
    scheduler.kv.find_shared = lambda request: looked.append(request) or find(request)
    head = make_request("b", list(range(40, 70)), arrival=2)
    scheduler.add(head)
    for _ in range(8):
        answer(scheduler, scheduler.schedule())
    assert looked == [head]
    while head.status is not RequestStatus.FINISHED:
        answer(scheduler, scheduler.schedule())


def test_who_waits_for_a_common_prefix_takes_no_blocks_meanwhile():
    scheduler = make_scheduler(max_num_seqs=8)
    for number in range(50):
        scheduler.add(make_request(str(number), [*range(100, 140), number], arrival=number))
    taken = []
    scheduler.kv.enter = lambda *arguments, enter=scheduler.kv.enter: taken.append(1) or enter(*arguments)
    assert len(scheduler.schedule().requests) == 1 and len(taken) == 1
    assert len(scheduler.schedule().requests) == 8 and len(taken) == 8


def test_equal_prompts_that_end_with_a_block_enter_together():
    scheduler = make_scheduler()
    for number in range(4):
        scheduler.add(make_request(str(number), list(range(10, 18)), arrival=number))
    assert len(scheduler.schedule().requests) == 1
    assert len(scheduler.schedule().requests) == 4


@settings(max_examples=60, deadline=None)
@given(prompt=st.lists(st.integers(0, 900), min_size=1, max_size=40), salt=st.sampled_from(["", "x"]))
def test_hashes_that_come_with_a_prompt_are_those_that_the_engine_makes(prompt, salt):
    scheduler = make_scheduler()
    root = PrefixRoot(salt=salt)
    request = make_request("a", prompt, prefix_root=root, max_output=1)
    scheduler.add(request)
    answer(scheduler, scheduler.schedule())
    made = prompt_hashes(request.prompt, 4, root)
    assert b"".join(request.block_hashes) == made
    assert len(made) == 32 * (len(prompt) // 4)


def test_blocks_that_nobody_can_find_are_reused_before_cached_prefixes():
    scheduler = make_scheduler(num_blocks=12)
    prompt = list(range(100, 117))
    scheduler.add(make_request("kept", prompt, max_output=1, arrival=0))
    answer(scheduler, scheduler.schedule())
    for number in range(1, 30):  # each fills no block, and leaves one behind
        scheduler.add(make_request(str(number), [number] * 2, max_output=1, arrival=number))
        answer(scheduler, scheduler.schedule())
    again = make_request("again", prompt, arrival=99)
    scheduler.add(again)
    scheduler.schedule()
    assert again.cached_tokens == 16


def test_ended_requests_keep_no_tokens_of_their_parents():
    scheduler = make_scheduler()
    parent = make_request("p", [5, 6, 7], max_output=1, arrival=1)
    child = make_request("c", [5, 6, 7], arrival=2, fork_of=parent)
    scheduler.add(parent)
    scheduler.add(child)
    answer(scheduler, scheduler.schedule())
    answer(scheduler, scheduler.schedule())
    assert child.fork_of is None


def test_sequences_of_one_request_hold_one_prompt():
    core = make_core(make_scheduler())
    core.add(add_message("a", list(range(50)), n=4))
    held = {id(request.prompt) for request in core.scheduler.sequences("a")}
    assert len(held) == 1
