"""Several workers as the engine sees them: results, faults that all have or only some, deaths, hangs, slow starts. The
workers are threads that run the worker process's own loop around a made-up device."""

from __future__ import annotations

import tempfile
import threading
import time
from array import array
from pathlib import Path

import pytest
from engine_kit import TOKEN, add_message, make_core, make_scheduler

import anychip.launch.worker_main as worker_main
from anychip.config import EngineConfig
from anychip.errors import DeviceFault, EngineDead, EngineHung
from anychip.executor.links import FolderLinks
from anychip.executor.multiprocess import MultiprocessExecutor
from anychip.executor.progress import Progress
from anychip.process_specs import WorkerLink, WorkerSpec
from anychip.scheduler.lanes import empty_decision
from anychip.step_messages import LaneDecisions, LaneInputs, LateInputs, StepDecision, StepResult
from anychip.worker_report import DeviceRules, KVCacheConfig, KVGroup, MemoryPlan, WorkerReady

READY = WorkerReady(
    KVCacheConfig(64, (KVGroup(block_size=4),)), DeviceRules(), MemoryPlan(0, 0, 0, 0, 64, 0, 0.0), "fake:0"
)


class Result:
    def __init__(self, step_id: int, rows: int, fault: DeviceFault | None) -> None:
        self.step_id, self.rows, self.fault = step_id, rows, fault

    def fetch(self) -> StepResult:
        if self.fault is not None:
            raise self.fault
        return StepResult(self.step_id, array("i", [TOKEN] * self.rows).tobytes(), {})


MANY = 900
"""Tokens: more steps than a fault takes to arrive. No collective makes rank 0 wait for rank 1 here."""


class FakeWorker:
    """`plan` says what goes wrong: (rank, step): "launch", "sample" or "fetch" raises, or the rank "hangs"."""

    def __init__(self, rank, plan: dict[tuple[int, int], str], *, fatal: bool, samples, released: threading.Event):
        self.ready = READY
        self.released = released
        self.rank, self.plan, self.fatal, self.samples = rank, plan, fatal, samples
        self.open: int | None = None

    def fault(self, step_id: int, where: str) -> DeviceFault | None:
        if self.plan.get((self.rank, step_id)) != where:
            return None
        message = f"asked 2 GiB in step {step_id}"
        return DeviceFault(message, kind="out_of_memory", fatal=self.fatal, ranks=(self.rank,))

    def launch(self, decision: StepDecision) -> None:
        assert self.open is None, "a step was launched and not sampled"
        if (fault := self.fault(decision.step_id, "launch")) is not None:
            raise fault
        if self.plan.get((self.rank, decision.step_id)) == "hangs":
            self.released.wait()
        self.open = decision.step_id

    def sample(self, late: LateInputs) -> Result:
        assert self.open == late.step_id
        self.open = None
        if (fault := self.fault(late.step_id, "sample")) is not None:
            raise fault
        return Result(late.step_id, self.samples.get(late.step_id, 1), self.fault(late.step_id, "fetch"))

    def close(self, reason: str) -> None: ...


class Thread:
    """executor.ChildProcess of a thread."""

    pid = 1

    def __init__(self, spec: WorkerSpec) -> None:
        self.shown = self.killed = False
        self.code: int | None = None
        self._process = worker_main.WorkerProcess(spec)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.code = self._process.run()

    def exit_code(self) -> int | None:
        return self.code

    def show_stack(self) -> None:
        self.shown = True

    def kill(self) -> None:
        self.killed = True

    def stop(self, deadline_s: float) -> None:
        if not self.killed:
            self._thread.join(deadline_s)


@pytest.fixture
def start(monkeypatch):
    """Starts an executor of `world_size` workers, with what goes wrong in them."""
    executors: list[MultiprocessExecutor] = []
    released = threading.Event()

    def make(plan, *, world_size=2, num_lanes=1, fatal=False, load=None, **progress):
        folder, samples, children = tempfile.mkdtemp(prefix="w-"), {}, []

        def load_worker(spec, got_on):
            if load is not None:
                load(spec.rank, got_on, released)
            return FakeWorker(spec.rank, plan, fatal=fatal, samples=samples, released=released)

        monkeypatch.setattr(worker_main, "load_worker", load_worker)

        def child(rank: int, link: WorkerLink) -> Thread:
            spec = WorkerSpec(
                config=EngineConfig(data_parallel_size=num_lanes), device="fake", device_indexes=(rank,), rank=rank,
                world_size=world_size, store="", folder=folder, probe={}, link=link,
            )  # fmt: skip
            children.append(Thread(spec))
            return children[-1]

        executor = MultiprocessExecutor(
            links=FolderLinks(Path(folder)),
            world_size=world_size,
            start=child,
            progress=Progress(**progress),
            peers_timeout_s=1.0,
            num_lanes=num_lanes,
        )
        executors.append(executor)
        executor.samples, executor.children, executor.released = samples, children, released
        return executor

    yield make
    released.set()
    for executor in executors:
        executor.close("test ends")


def core_over(executor: MultiprocessExecutor, max_in_flight: int):
    scheduler = make_scheduler(max_num_seqs=2, num_blocks=512)
    core = make_core(scheduler, max_in_flight=max_in_flight)
    schedule = scheduler.schedule

    def watched():
        step = schedule()
        if step is not None:
            executor.samples[step.decision.step_id] = len(step.sampling)
        return step

    core.executor.expect = lambda step_id, rows: executor.samples.update({step_id: rows})
    core.executor, scheduler.schedule = executor, watched
    executor._progress.started()
    return core


def run(core) -> list:
    deltas = []
    while core.has_work:
        deltas += core.step()
    return deltas


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("where", ["launch", "sample", "fetch"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_that_fails_on_every_rank_costs_its_requests_and_the_engine_goes_on(
    start, where, max_in_flight, world_size
):
    failing = {(rank, step_id): where for rank in range(world_size) for step_id in (2, 3)}
    core = core_over(start(failing, world_size=world_size), max_in_flight)
    names = [str(index) for index in range(8)]
    for name in names:
        core.add(add_message(name, [3, 4, 5, 6, 7, 8], max_output=5))
    deltas = run(core)
    failed = {delta.request_id: delta.error for delta in deltas if delta.error is not None}
    assert 1 <= len(failed) < len(names)
    assert all(kind == "StepFailed" and "asked 2 GiB in step" in text for kind, text in failed.values())
    for name in set(names) - set(failed):
        assert [token for d in deltas if d.request_id == name for token in d.token_ids] == [TOKEN] * 5
    pool = core.scheduler.kv.pool
    assert pool.num_free == pool.num_usable and not core.scheduler.requests


@pytest.mark.parametrize("where", ["launch", "sample", "fetch"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_fails_on_some_ranks_ends_the_engine(start, rank, where):
    core = core_over(start({(rank, 2): where}), 2)
    core.add(add_message("a", [5, 6], max_output=MANY))
    with pytest.raises(DeviceFault, match=f"step 2 failed on rank {rank} of 2 alone: asked 2 GiB") as caught:
        run(core)
    assert caught.value.fatal and caught.value.kind == "out_of_memory" and caught.value.ranks == (rank,)


def test_a_fatal_fault_crosses_with_kind_and_ranks(start):
    core = core_over(start({(1, 2): "launch"}, fatal=True), 2)
    core.add(add_message("a", [5, 6], max_output=MANY))
    with pytest.raises(DeviceFault, match="worker 1: asked 2 GiB in step 2") as caught:
        run(core)
    assert caught.value.fatal and caught.value.kind == "out_of_memory" and caught.value.ranks == (1,)


def test_workers_that_hang_are_shown_and_ended(start):
    executor = start({(0, 2): "hangs"}, step_timeout_s=0.5)
    core = core_over(executor, 2)
    core.add(add_message("a", [5, 6], max_output=8))
    with pytest.raises(EngineHung, match="made no progress for 1 s, 0 s may pass: step 2 of 1 sequences"):
        run(core)
    assert all(child.shown and child.killed for child in executor.children)


def test_a_slow_start_that_gets_on_is_waited_for(start, monkeypatch):
    monkeypatch.setattr(worker_main, "_PROGRESS_EVERY_S", 0.0)

    def load(rank, got_on, released):
        for number in range(12):
            got_on(f"{number} GB of weights are read")
            time.sleep(0.1)

    assert start({}, load=load, start_timeout_s=0.8).ready.device == "fake:0"


def test_a_start_that_gets_no_further_is_ended(start):
    def load(rank, got_on, released):
        got_on("1 GB of weights is read")
        if rank == 1:
            released.wait()

    with pytest.raises(EngineHung, match="1 of 2 are not ready; .*raise --start-timeout-s"):
        start({}, load=load, start_timeout_s=0.5)


def test_a_worker_that_is_gone_is_missed(start):
    executor = start({(0, 2): "hangs"})
    core = core_over(executor, 1)
    core.add(add_message("a", [5, 6], max_output=8))
    executor.children[1].code = 3
    with pytest.raises(EngineDead, match="worker 1 exited with status 3"):
        run(core)


# -- lanes ----------------------------------------------------------------------------------------------------


def launch_lanes(executor: MultiprocessExecutor, step_id: int, parts: tuple[bool, ...]) -> None:
    """A step in which these lanes have a part."""
    executor.launch(LaneDecisions(step_id, [empty_decision(step_id) if part else None for part in parts]))
    executor.sample(LaneInputs(step_id, [LateInputs(step_id, {}) if part else None for part in parts]))


def collected(executor: MultiprocessExecutor) -> tuple[int, list[tuple[int, int] | None]]:
    result = executor.collect()
    return result.step_id, [None if each is None else (each.step_id, each.lane) for each in result.lanes]


def test_each_lane_reports_by_one_of_its_ranks_and_one_without_a_part_is_not_asked(start):
    executor = start({}, world_size=4, num_lanes=2)
    launch_lanes(executor, 1, (True, True))
    launch_lanes(executor, 2, (False, True))
    launch_lanes(executor, 3, (True, True))
    assert collected(executor) == (1, [(1, 0), (1, 1)])
    assert collected(executor) == (2, [None, (2, 1)])
    assert collected(executor) == (3, [(3, 0), (3, 1)])


def test_a_lane_that_is_ahead_waits_for_the_others_results(start):
    executor = start({(0, 1): "hangs"}, world_size=2, num_lanes=2)
    for step_id in (1, 2, 3):
        launch_lanes(executor, step_id, (True, step_id != 2))
    threading.Timer(0.3, executor.released.set).start()
    assert collected(executor) == (1, [(1, 0), (1, 1)])
    assert collected(executor) == (2, [(2, 0), None])
    assert collected(executor) == (3, [(3, 0), (3, 1)])


def test_a_step_that_fails_in_one_lane_ends_the_engine_and_one_that_fails_in_all_does_not(start):
    executor = start(
        {(0, 1): "fetch", (1, 1): "fetch", (2, 1): "fetch", (3, 1): "fetch", (2, 3): "launch", (3, 3): "launch"},
        world_size=4,
        num_lanes=2,
    )
    for step_id in (1, 2, 3):
        launch_lanes(executor, step_id, (True, True))
    with pytest.raises(DeviceFault, match="asked 2 GiB in step 1") as caught:
        executor.collect()
    assert not caught.value.fatal and caught.value.ranks == (0, 1, 2, 3)
    assert collected(executor) == (2, [(2, 0), (2, 1)])
    with pytest.raises(DeviceFault, match="step 3 failed on rank .* of 4 alone: asked 2 GiB") as caught:
        executor.collect()
    assert caught.value.fatal
