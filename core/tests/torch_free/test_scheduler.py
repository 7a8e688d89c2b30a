"""Decisions under budgets, rules and policies; late results; and that no block is ever lost."""

from __future__ import annotations

from array import array

import pytest
from engine_kit import answer, counts, make_request, make_scheduler, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.errors import ConfigError
from anychip.request import RequestStatus
from anychip.scheduler.policy import PriorityPolicy, make_policy
from anychip.step_messages import StepResult
from anychip.worker_report import DeviceRules, KVGroup, StateGroup


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("a", list(range(20))))
    sizes = []
    while scheduler.has_work:
        step = scheduler.schedule()
        sizes += counts(step.decision)
        answer(scheduler, step)
    assert sizes == [8, 8, 4, 1, 1, 1]


def test_decodes_and_chunks_share_a_step():
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("a", [5, 6], arrival=1))
    answer(scheduler, scheduler.schedule())
    scheduler.add(make_request("b", list(range(20)), arrival=2))
    assert counts(scheduler.schedule().decision) == [1, 7]


def test_the_next_step_is_scheduled_before_the_ids_of_this_one_are_known():
    scheduler = make_scheduler()
    request = make_request("a", [5, 6, 7], max_output=3)
    scheduler.add(request)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert counts(second.decision) == [1]
    assert request.num_promised == 2
    answer(scheduler, first)
    answer(scheduler, second)
    assert request.output_token_ids == [7, 7]


def test_promises_stop_at_the_requests_limit():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [5, 6], max_output=2))
    steps = [scheduler.schedule(), scheduler.schedule()]
    assert scheduler.schedule() is None
    ends = [delta.finish_reason for step in steps for delta in answer(scheduler, step)]
    assert ends == [None, "length"]


def test_a_stop_token_ends_a_request_and_drops_what_is_in_flight_for_it():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [5, 6], max_output=9))
    first, second = scheduler.schedule(), scheduler.schedule()
    (end,) = answer(scheduler, first, token=2)
    assert end.finish_reason == "stop"
    assert answer(scheduler, second) == []
    assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable


def test_a_late_result_of_a_preempted_request_is_dropped():
    scheduler = make_scheduler()
    request = make_request("a", [5, 6, 8], max_output=4)
    scheduler.add(request)
    step = scheduler.schedule()
    scheduler.preempt(request)
    assert request.status is RequestStatus.PREEMPTED
    assert answer(scheduler, step) == []
    assert request.num_output == 0
    run_to_end(scheduler)
    assert request.num_output == 4


def test_preemption_takes_the_youngest_and_keeps_its_prefix_blocks():
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=2)
    old = make_request("old", list(range(10, 26)), max_output=9, arrival=1)
    young = make_request("young", list(range(30, 46)), max_output=9, arrival=2)
    for request in (old, young):
        scheduler.add(request)
    while not scheduler.num_preemptions:
        answer(scheduler, scheduler.schedule())
    assert young.status is RequestStatus.PREEMPTED
    assert old.status is RequestStatus.RUNNING
    run_to_end(scheduler)
    assert old.num_output == young.num_output == 9


def test_requests_that_arrive_together_share_what_the_first_computes():
    """The second waits a step, while the first computes their common blocks, and is scheduled before that step's
    result is in; a third, which shares nothing, does not wait."""
    scheduler = make_scheduler()
    common = list(range(10, 18))
    first, second = make_request("a", [*common, 3], arrival=1), make_request("b", [*common, 4], arrival=2)
    other = make_request("c", list(range(30, 36)), arrival=3)
    for request in (first, second, other):
        scheduler.add(request)
    step = scheduler.schedule()
    assert counts(step.decision) == [9, 6]
    assert second.status is RequestStatus.WAITING
    following = scheduler.schedule()
    assert counts(following.decision) == [1, 1, 1]
    assert second.cached_tokens == 8
    answer(scheduler, step)
    answer(scheduler, following)
    run_to_end(scheduler)
    assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable


def test_blocks_of_steps_in_flight_are_waited_for_rather_than_preempting_again():
    scheduler = make_scheduler(num_blocks=5, max_num_seqs=2, prefix_caching=False)
    first = make_request("a", list(range(8)), max_output=2, arrival=1)
    second = make_request("b", list(range(20, 28)), max_output=2, arrival=2)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    scheduler.abort(first.request_id, 0)
    assert scheduler.schedule() is None, "the aborted request's blocks are still being written"
    answer(scheduler, step)
    run_to_end(scheduler)
    assert second.num_output == 2
    assert scheduler.num_preemptions == 0


def test_priority_runs_lower_numbers_first():
    scheduler = make_scheduler(max_num_seqs=1, policy=PriorityPolicy())
    late = make_request("late", [5], priority=5, arrival=1)
    soon = make_request("soon", [6], priority=1, arrival=2)
    scheduler.add(late)
    scheduler.add(soon)
    scheduler.schedule()
    assert soon.status is RequestStatus.RUNNING
    assert late.status is RequestStatus.WAITING


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(ConfigError, match="there are fair, fcfs, predictive, priority"):
        make_policy("lottery", {})


# -- a device's rules ------------------------------------------------------------------------------------


def test_without_mixing_a_step_holds_prefills_or_decodes():
    scheduler = make_scheduler(rules=DeviceRules(mix_prefill_decode=False))
    scheduler.add(make_request("a", [5, 6, 7], arrival=1))
    answer(scheduler, scheduler.schedule())
    scheduler.add(make_request("b", [8, 9, 10], arrival=2))
    assert counts(scheduler.schedule().decision) == [3]
    assert counts(scheduler.schedule().decision) == [1, 1]


def test_max_prefills_bounds_a_step():
    scheduler = make_scheduler(rules=DeviceRules(max_prefills=1))
    for index in range(3):
        scheduler.add(make_request(str(index), [5, 6, 7], arrival=index))
    assert counts(scheduler.schedule().decision) == [3]


def test_a_chunk_that_is_not_the_last_has_a_multiple():
    scheduler = make_scheduler(budget=10, rules=DeviceRules(chunk_multiple=4))
    scheduler.add(make_request("a", list(range(19))))
    sizes = []
    for _ in range(3):
        step = scheduler.schedule()
        sizes += counts(step.decision)
        answer(scheduler, step)
    assert sizes == [8, 8, 3]


def test_padded_tokens_bound_the_rectangle():
    scheduler = make_scheduler(rules=DeviceRules(max_padded_tokens=16))
    for index in range(4):
        scheduler.add(make_request(str(index), list(range(6)), arrival=index))
    sizes = counts(scheduler.schedule().decision)
    assert len(sizes) * max(sizes) <= 16


# -- whatever happens, every block comes back -------------------------------------------------------------

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 8), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("schedule")),
        st.tuples(st.just("retire"), st.sampled_from([2, 7, 8])),
        st.tuples(st.just("abort"), st.integers(0, 40)),
        st.tuples(st.just("preempt"), st.integers(0, 7)),
        st.tuples(st.just("transfer begins"), st.integers(0, 7)),
        st.tuples(st.just("transfer ends")),
    ),
    max_size=80,
)
GROUPS = st.sampled_from(
    [
        (KVGroup(block_size=4),),
        (KVGroup(block_size=4), KVGroup(block_size=4, window=6)),
        (KVGroup(block_size=8), KVGroup(block_size=4, window=5)),
        (KVGroup(block_size=4), StateGroup()),
        (KVGroup(block_size=4, window=6), StateGroup()),
        (StateGroup(),),
    ]
)


@settings(max_examples=150, deadline=None)
@given(actions=ACTIONS, groups=GROUPS, caching=st.booleans(), blocks=st.integers(24, 48), mixing=st.booleans())
def test_after_any_workload_free_blocks_are_all_blocks(actions, groups, caching, blocks, mixing):
    scheduler = make_scheduler(
        num_blocks=blocks,
        groups=groups,
        max_num_seqs=4,
        budget=9,
        prefix_caching=caching,
        rules=DeviceRules(mix_prefill_decode=mixing),
    )
    in_flight, transfers, requests = [], [], []

    def retire(token):
        step = in_flight.pop(0)
        ids = array("i", [token] * len(step.sampling)).tobytes()
        scheduler.update(step, StepResult(step.decision.step_id, ids, {}))

    for number, (action, *values) in enumerate(actions):
        if action == "add":
            length, output, n, shared = values
            prompt = list(range(100, 100 + length)) if shared else [(number * 31 + i) % 900 + 3 for i in range(length)]
            parent = None
            for _ in range(n):
                request = make_request(
                    f"{number}.{len(requests)}", prompt, max_output=output, arrival=len(requests), fork_of=parent
                )
                parent = parent or request
                requests.append(request)
                scheduler.add(request)
        elif action == "schedule" and len(in_flight) < 3:
            step = scheduler.schedule()
            if step is not None:
                in_flight.append(step)
        elif action == "retire" and in_flight:
            retire(values[0])
        elif action == "abort" and requests:
            scheduler.abort(requests[values[0] % len(requests)].request_id, 0)
        elif action == "preempt" and scheduler.running:
            scheduler.preempt(scheduler.running[values[0] % len(scheduler.running)])
        elif action == "transfer begins" and scheduler.running:
            request = scheduler.running[values[0] % len(scheduler.running)]
            tokens = [
                table for group, table in zip(groups, request.block_ids, strict=True) if isinstance(group, KVGroup)
            ]
            held = [block for table in tokens for block in table if block]
            for block in held:
                scheduler.kv.pool.take([block])
            transfers.append(held)
        elif action == "transfer ends" and transfers:
            scheduler.kv.pool.release(transfers.pop(0))

    for held in transfers:
        scheduler.kv.pool.release(held)
    while in_flight:
        retire(7)
    run_to_end(scheduler, limit=5000)
    assert all(request.status is RequestStatus.FINISHED for request in requests)
    assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable
    scheduler.kv.check_integrity(requests)
    assert scheduler.kv.states is None or scheduler.kv.states.num_free == scheduler.kv.states.num_usable
    assert sorted(scheduler._free_slots) == list(range(4))
