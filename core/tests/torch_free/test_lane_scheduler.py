"""Lanes under one scheduler: where requests go, one step id for all, and decisions for lanes without requests."""

from __future__ import annotations

from array import array
from collections import deque

import pytest
from engine_kit import TOKEN, VOCAB_SIZE, add_message, counts, make_request, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.engine.engine_core import EngineCore
from anychip.errors import DeviceFault
from anychip.scheduler.lanes import LaneScheduler, LaneStep, empty_decision
from anychip.step_messages import LaneDecisions, LaneInputs, LaneResults, LateInputs, StepDecision, StepResult
from anychip.worker_report import DeviceRules, KVCacheConfig, MemoryPlan, WorkerReady


def make_lanes(count: int = 2, *, meeting: bool = True, **settings: object) -> LaneScheduler:
    return LaneScheduler([make_scheduler(**settings) for _ in range(count)], meeting=meeting)  # type: ignore[arg-type]


def answer(scheduler: LaneScheduler, step: LaneStep):
    """Every sampling row of every lane draws the same token, taken in."""
    results = [
        None
        if decision is None
        else StepResult(
            step.decision.step_id, array("i", [TOKEN] * (0 if own is None else len(own.sampling))).tobytes(), {}
        )
        for own, decision in zip(step.lanes, step.decision.lanes, strict=True)
    ]
    return scheduler.update(step, LaneResults(step.decision.step_id, results))


def lane_of(scheduler: LaneScheduler, name: str) -> int:
    (found,) = [index for index, lane in enumerate(scheduler.lanes) if name in lane.requests]
    return found


def run_to_end(scheduler: LaneScheduler) -> list:
    deltas = []
    while (step := scheduler.schedule()) is not None:
        deltas += answer(scheduler, step)
    assert not scheduler.has_work
    return deltas


# -- where a request goes -------------------------------------------------------------------------------------


def test_requests_go_to_the_lane_with_least_to_compute_and_equals_to_the_first():
    scheduler = make_lanes(3)
    for name, length in (("a", 9), ("b", 5), ("c", 2), ("d", 1), ("e", 4)):
        scheduler.add(make_request(name, [3] * length))
    assert [lane_of(scheduler, name) for name in "abcde"] == [0, 1, 2, 2, 2]


def test_a_request_goes_where_its_prefix_is_held():
    scheduler = make_lanes()
    first, second = [5] * 12, [6] * 12
    scheduler.add(make_request("a", first))
    scheduler.add(make_request("b", second))
    run_to_end(scheduler)
    scheduler.add(make_request("c", [*second, 9]))
    scheduler.add(make_request("d", [*second, 8]))
    scheduler.add(make_request("e", [*first, 8]))
    assert [lane_of(scheduler, name) for name in "cde"] == [1, 1, 0]
    assert scheduler.schedule() is not None
    assert scheduler.stats.prefix_hits == 36


def test_a_prefix_that_all_requests_have_does_not_bring_them_all_to_one_lane():
    scheduler = make_lanes(max_num_seqs=64, num_blocks=512, budget=32)
    system = [5] * 8
    scheduler.add(make_request("first", system))
    run_to_end(scheduler)
    for index in range(40):
        scheduler.add(make_request(str(index), [*system, 10 + index], arrival=index))
    held = [len(lane.requests) for lane in scheduler.lanes]
    assert sum(held) == 40 and min(held) >= 15


def test_a_lane_without_a_free_slot_gets_nothing_while_another_has_one():
    scheduler = make_lanes(max_num_seqs=2, budget=64)
    prefix = [5] * 12
    scheduler.add(make_request("first", prefix))
    run_to_end(scheduler)
    for index in range(5):
        scheduler.add(make_request(str(index), [*prefix, 10 + index], arrival=index))
    assert [lane_of(scheduler, str(index)) for index in range(5)] == [0, 0, 1, 1, 0]


def test_sequences_of_one_request_stay_together_and_are_found_and_ended_wherever_they_are():
    scheduler = make_lanes()
    scheduler.add(make_request("long", [3] * 9))
    twins = [make_request("twins", [4, 5]) for _ in range(2)]
    twins[1].index = 1
    scheduler.add(*twins)
    assert lane_of(scheduler, "twins") == 1 and scheduler.sequences("twins") == twins
    assert [one.request_id for one in scheduler.all_sequences()] == ["long", "twins", "twins"]
    assert set(scheduler.requests) == {"long", "twins"}
    step = scheduler.schedule()
    assert scheduler.abort("twins", 0) and not scheduler.abort("twins", 0) and not scheduler.abort("nobody", 0)
    assert scheduler.sequences("twins") == twins[1:]
    answer(scheduler, step)
    assert scheduler.abort("twins", 1) and "twins" not in scheduler.requests


# -- a step over all lanes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("meeting", [True, False])
def test_a_lane_without_requests_is_told_an_empty_decision_where_lanes_meet_and_nothing_otherwise(meeting):
    scheduler = make_lanes(3, meeting=meeting)
    scheduler.add(make_request("a", [3, 4]))
    assert scheduler.schedule().decision.lanes[1:] == ([empty_decision(1)] * 2 if meeting else [None, None])
    alone = LaneDecisions(7, [None, empty_decision(7)])
    assert alone.num_tokens == b""


def test_all_lanes_have_one_step_id_whenever_each_of_them_begins():
    scheduler = make_lanes(meeting=False)
    scheduler.add(make_request("a", [3] * 9, max_output=6))
    ids = []
    for late in (False, True, False, False, False, False):
        if late:
            scheduler.add(make_request("b", [4] * 3, max_output=2))
        step = scheduler.schedule()
        ids.append([None if each is None else each.step_id for each in step.decision.lanes])
        answer(scheduler, step)
    assert ids == [[1, None], [2, 2], [3, 3], [4, None], [5, None], [6, None]]
    assert scheduler.stats.steps == 6 and scheduler.schedule() is None


def test_stats_are_sums_and_say_how_each_lane_stands():
    scheduler = make_lanes(max_num_seqs=1)
    for index, length in enumerate((9, 5, 3)):
        scheduler.add(make_request(str(index), [3 + index] * length, arrival=index))
    scheduler.schedule()
    stats = scheduler.stats
    assert (stats.running, stats.waiting, stats.waiting_tokens) == (2, 1, 3)
    assert [(lane.running, lane.waiting, lane.kv_blocks_used) for lane in stats.lanes] == [(1, 0, 3), (1, 1, 2)]
    assert stats.kv_blocks_used == 5 and stats.kv_blocks == 126
    assert len(scheduler.waiting) == 1 and scheduler.waiting.num_tokens == 3


def test_new_weights_are_new_in_every_lane():
    scheduler = make_lanes()
    for name, token in (("a", 5), ("b", 6)):
        scheduler.add(make_request(name, [token] * 12))
    run_to_end(scheduler)
    scheduler.weights_changed()
    assert [lane.kv.weights_version for lane in scheduler.lanes] == [1, 1]
    held = [lane.kv.find_shared(make_request("c", [t] * 12)) for t, lane in zip((5, 6), scheduler.lanes, strict=True)]
    assert [shared.num_tokens for shared in held] == [0, 0]


# -- under the engine's loop ----------------------------------------------------------------------------------


class Lanes:
    """executor.Executor that checks what it is told, and answers for every lane."""

    def __init__(self, scheduler: LaneScheduler) -> None:
        kv = KVCacheConfig(64, scheduler.kv.groups)
        self.ready = WorkerReady(kv, DeviceRules(), MemoryPlan(0, 0, 0, 0, 64, 0, 0.0), "fake:0")
        self.meeting = scheduler.meeting
        self.told: list[int] = [0] * len(scheduler.lanes)
        self._open: LaneDecisions | None = None
        self._pending: deque[LaneDecisions] = deque()
        self.known: list[dict[int, int]] = [{} for _ in scheduler.lanes]  # by slot: tokens left of what is known

    def launch(self, decision: LaneDecisions) -> None:
        assert self._open is None and any(each is not None and each.slots for each in decision.lanes)
        for lane, each in enumerate(decision.lanes):
            assert each is not None or not self.meeting
            assert each is None or each.step_id == decision.step_id
            self.told[lane] += each is not None
        self._open = decision

    def sample(self, late: LaneInputs) -> None:
        assert self._open is not None and late.step_id == self._open.step_id
        for each, inputs in zip(self._open.lanes, late.lanes, strict=True):
            assert (each is None) == (inputs is None)
        self._pending.append(self._open)
        self._open = None

    def collect(self) -> LaneResults:
        decision = self._pending.popleft()
        results = [
            None if each is None else StepResult(each.step_id, self._drawn(lane, each), {})
            for lane, each in enumerate(decision.lanes)
        ]
        return LaneResults(decision.step_id, results)

    def _drawn(self, lane: int, decision: StepDecision) -> bytes:
        known, drawn = self.known[lane], 0
        for row in decision.new_rows:
            known[row.slot] = len(row.token_ids) // 4 - row.num_computed
        for slot, count in zip(memoryview(decision.slots).cast("i"), counts(decision), strict=True):
            known[slot] -= count
            if known[slot] == 0:
                known[slot], drawn = 1, drawn + 1
        return array("i", [TOKEN] * drawn).tobytes()

    def check(self) -> None: ...

    def close(self, reason: str) -> None: ...


def core_of(scheduler: LaneScheduler, max_in_flight: int) -> EngineCore:
    return EngineCore(
        scheduler=scheduler,
        executor=Lanes(scheduler),  # type: ignore[arg-type]  # loads no adapters
        vocab_size=VOCAB_SIZE,
        max_model_len=64,
        max_in_flight=max_in_flight,
        max_waiting=100,
        max_waiting_tokens=10_000,
        seed=0,
    )


@pytest.mark.parametrize("meeting", [True, False])
@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=14),
    aborts=st.sets(st.integers(0, 13)),
    max_in_flight=st.integers(1, 2),
    num_lanes=st.integers(2, 4),
    num_blocks=st.sampled_from([10, 64]),
)
def test_every_request_ends_and_every_block_returns(meeting, arrivals, aborts, max_in_flight, num_lanes, num_blocks):
    """Requests come between steps, some leave, and pools are too small for those of a lane at once."""
    scheduler = make_lanes(num_lanes, meeting=meeting, num_blocks=num_blocks, budget=16, max_num_seqs=4)
    core = core_of(scheduler, max_in_flight)
    outputs: dict[str, int] = {}
    ended: dict[str, str] = {}

    def step() -> None:
        for delta in core.step():
            outputs[delta.request_id] = outputs.get(delta.request_id, 0) + len(delta.token_ids)
            if delta.finish_reason is not None:
                ended[delta.request_id] = delta.finish_reason

    for index, (length, max_output, steps) in enumerate(arrivals):
        core.add(add_message(str(index), [3 + (index + at) % 5 for at in range(length)], max_output=max_output))
        for _ in range(steps):
            step()
        if index in aborts:
            for delta in core.abort(str(index // 2)):
                ended[delta.request_id] = delta.finish_reason or ""
    for _ in range(2000):
        if not core.has_work:
            break
        step()
    assert set(ended) == {str(index) for index in range(len(arrivals))}
    for index, (_, max_output, _) in enumerate(arrivals):
        assert ended[str(index)] == "abort" or outputs[str(index)] == max_output
    for lane in scheduler.lanes:
        lane.kv.check_integrity([])
        assert lane.kv.pool.num_free == lane.kv.pool.num_usable


@pytest.mark.parametrize("meeting", [True, False])
def test_a_step_that_fails_in_all_lanes_costs_its_requests_and_the_others_go_on(meeting):
    scheduler = make_lanes(meeting=meeting, max_num_seqs=2)
    core = core_of(scheduler, 2)
    collect, calls = core.executor.collect, []

    def failing() -> LaneResults:
        result = collect()
        calls.append(result)
        if len(calls) == 2:
            raise DeviceFault("asked 2 GiB", kind="out_of_memory", fatal=False)
        return result

    core.executor.collect = failing
    names = [str(index) for index in range(8)]
    for index, name in enumerate(names):
        core.add(add_message(name, [3 + index] * 5, max_output=5))
    deltas = []
    while core.has_work:
        deltas += core.step()
    failed = {delta.request_id for delta in deltas if delta.error is not None}
    assert failed == set(names[:4]), "two of each lane were in the step"
    for name in set(names) - failed:
        assert [token for d in deltas if d.request_id == name for token in d.token_ids] == [TOKEN] * 5
    for lane in scheduler.lanes:
        lane.kv.check_integrity([])
        assert lane.kv.pool.num_free == lane.kv.pool.num_usable and not lane.requests


def test_restrictions_reach_the_lane_of_their_request():
    scheduler = make_lanes()
    core = core_of(scheduler, 1)
    seen: list[LaneInputs] = []
    sample = core.executor.sample
    core.executor.sample = lambda late: (seen.append(late), sample(late))[1]
    core.add(add_message("free", [3] * 9, max_output=2))
    core.add(add_message("bound", [4, 5], max_output=2, allowed_token_ids=(7, 9)))
    while core.has_work:
        core.step()
    assert len(seen) == 2
    for late in seen:
        assert isinstance(late.lanes[0], LateInputs) and late.lanes[0].masks == {}
        assert list(late.lanes[1].masks) == [0]
