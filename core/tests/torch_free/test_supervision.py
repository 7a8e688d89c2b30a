"""Engines that are started, die and are started again, without one: what AsyncLLM and the engine's loop make of it."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
import zmq
from engine_kit import add_message, make_core, make_scheduler

import anychip.launch.async_llm as async_llm
import anychip.launch.engine_process as engine_process
from anychip.config import EngineConfig
from anychip.engine.async_engine import AsyncEngine
from anychip.engine.engine_loop import EngineLoop
from anychip.engine.input_processor import RequestOptions
from anychip.engine.ipc import encoder, from_engine_decoder, output_endpoint, request_endpoint
from anychip.engine.output_processor import OutputProcessor
from anychip.engine_stats import EngineStats
from anychip.errors import ConfigError, EngineDead, EngineHung, RequestTimeout
from anychip.executor.progress import Progress
from anychip.launch.async_llm import AsyncLLM
from anychip.messages import AddRequest, EngineReady, Heartbeat, Outputs, Shutdown
from anychip.observability.metrics import Metrics
from anychip.sampling_params import SamplingParams, StructuredOutput

# -- the supervisor -------------------------------------------------------------------------------------------


class FakeProcess:
    """An engine process that dies when it is told to; `starts` says what becomes of the next ones."""

    made: list[FakeProcess]
    starts: list[BaseException | None]

    def __init__(self) -> None:
        self.engine = self
        self.dead: Exception | None = None
        self.died = asyncio.Event()
        self.num_ends = 0

    @classmethod
    async def begin(cls, config) -> FakeProcess:
        outcome = cls.starts.pop(0) if cls.starts else None
        if isinstance(outcome, OSError):
            raise outcome
        cls.made.append(cls())
        cls.made[-1].dead = outcome
        return cls.made[-1]

    async def ready(self) -> EngineReady | None:
        if isinstance(self.dead, asyncio.CancelledError):
            await asyncio.Event().wait()
        if self.dead is not None:
            raise self.dead

    async def ended(self) -> Exception:
        await self.died.wait()
        return self.dead

    async def end(self, drain_s: float) -> None:
        self.num_ends += 1

    def die(self) -> None:
        self.dead = EngineDead("killed")
        self.died.set()


@pytest.fixture
def supervised(monkeypatch):
    """An AsyncLLM over a fake process that is ready; pauses between starts pass at once."""
    real_sleep = asyncio.sleep
    monkeypatch.setattr(async_llm, "EngineProcess", FakeProcess)
    monkeypatch.setattr(AsyncLLM, "_adopt", lambda self, ready: None)
    monkeypatch.setattr(async_llm.asyncio, "sleep", lambda seconds: real_sleep(0))

    async def make(*starts: BaseException | None, restarts: int = 5) -> AsyncLLM:
        FakeProcess.made, FakeProcess.starts = [FakeProcess()], list(starts)
        llm = AsyncLLM(EngineConfig(), restarts=restarts)
        llm.grammars = None
        llm._process = FakeProcess.made[0]
        llm._supervisor = asyncio.create_task(llm._supervise())
        return llm

    return make


async def settle() -> None:
    for _ in range(50):
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)


@pytest.mark.parametrize(
    "failure", [OSError(12, "Cannot allocate memory"), FileNotFoundError("mkdtemp"), EngineDead("no"), ValueError("?")]
)
def test_an_engine_that_could_not_be_started_again_is_tried_again(supervised, failure):
    async def run() -> None:
        llm = await supervised(failure, failure, None)
        FakeProcess.made[0].die()
        await settle()
        assert llm.dead is None and llm.engine is FakeProcess.made[-1]
        assert len(llm._restarted_at) == 3
        assert all(process.num_ends >= 1 for process in FakeProcess.made[:-1])
        await llm.close()

    asyncio.run(run())


def test_starts_that_fail_count_and_the_newest_cause_is_told(supervised):
    async def run() -> None:
        llm = await supervised(OSError("first"), *[EngineDead(f"start {number}") for number in range(9)], restarts=4)
        FakeProcess.made[0].die()
        await asyncio.wait_for(asyncio.wait([llm._supervisor]), 5)
        assert str(llm.dead) == "start 2"
        await llm.close()

    asyncio.run(run())


def test_closing_during_a_restart_ends_the_engine_that_starts(supervised):
    async def run() -> None:
        llm = await supervised(asyncio.CancelledError())
        FakeProcess.made[0].die()
        await settle()
        assert len(FakeProcess.made) == 2 and FakeProcess.made[1].num_ends == 0
        await llm.close()
        assert FakeProcess.made[1].num_ends >= 1 and llm._supervisor.done()

    asyncio.run(run())


def test_a_process_that_cannot_be_started_leaves_nothing(monkeypatch):
    folders: list[str] = []

    def child(module, spec):
        folders.append(spec.folder)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(engine_process, "Child", child)

    async def run() -> None:
        with pytest.raises(OSError, match="Cannot allocate"):
            await engine_process.EngineProcess.begin(EngineConfig())
        await settle()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert folders and not Path(folders[0]).exists()


class SilentChild:
    """A process that starts and says nothing."""

    pid = 2**22 + 1  # beyond any process's number

    def __init__(self, module, spec) -> None:
        self.killed = False

    def exit_code(self) -> int | None:
        return -9 if self.killed else None

    def kill(self) -> None:
        self.killed = True

    def stop(self, deadline_s: float) -> None:
        assert self.killed


def test_a_start_that_hangs_ends_with_the_cause(monkeypatch):
    monkeypatch.setattr(engine_process, "Child", SilentChild)

    async def run() -> None:
        process = await engine_process.EngineProcess.begin(EngineConfig(start_timeout_s=0.2))
        with pytest.raises(EngineHung, match="no progress for 2 s.*raise --start-timeout-s"):
            await asyncio.wait_for(process.engine.ready(), 10)
        assert isinstance(await process.ended(), EngineHung)
        await process.end(0.0)

    asyncio.run(run())


def test_limits_of_time_are_above_zero():
    with pytest.raises(ConfigError, match="step_timeout_s is 0; expected seconds above 0"):
        EngineConfig(step_timeout_s=0)


# -- deadlines ------------------------------------------------------------------------------------------------


def test_a_deadline_is_kept_though_the_engine_is_stuck(monkeypatch):
    monkeypatch.setattr("anychip.engine.async_engine._GRACE_S", 0.05)

    async def run() -> None:
        with TemporaryDirectory(prefix="s-") as folder:
            engine = AsyncEngine(Path(folder))
            engine.bind()
            engine.attach(OutputProcessor(None), lambda stats: None)
            request = AddRequest("a", array("i", [5]).tobytes(), SamplingParams(), 4, (), deadline=0.1)
            with pytest.raises(RequestTimeout, match="deadline"):
                async for _ in engine.generate(request):
                    pass
            assert engine.open_requests == []
            await engine.close()

    asyncio.run(run())


def test_a_deadline_is_kept_while_the_grammar_is_not_checked_yet():
    class Slow:
        async def check(self, wanted, tenant) -> None:
            await asyncio.Event().wait()

    async def run() -> None:
        llm = AsyncLLM(EngineConfig())
        llm._process = FakeProcess()
        llm.grammars = Slow()
        llm.inputs = type(
            "Inputs", (), {"process": lambda *_: AddRequest("a", array("i", [5]).tobytes(), SamplingParams(), 4, ())}
        )()
        sampling = SamplingParams(structured=StructuredOutput("regex", "a"))
        with pytest.raises(RequestTimeout, match="not begun within its deadline"):
            await llm.accept("a", [5], sampling, RequestOptions(deadline=0.05))

    asyncio.run(run())


# -- the engine's loop ----------------------------------------------------------------------------------------


class Api:
    """The API process's end of an engine loop's sockets."""

    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        self.received = self._context.socket(zmq.PULL)
        self.received.bind(output_endpoint(folder))
        self.sent = self._context.socket(zmq.PUSH)
        self.sent.connect(request_endpoint(folder))

    def messages(self, seconds: float):
        """What comes within so many seconds."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.received.poll(int(left * 1000) + 1):
                yield from_engine_decoder.decode(self.received.recv())

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def served():
    """A loop in a thread of its own over a core without a device, and the API process's end."""
    core = make_core(make_scheduler(num_blocks=4000, budget=64), max_in_flight=2)
    with TemporaryDirectory(prefix="l-") as name:
        folder, progress = Path(name), Progress()
        api = Api(folder)
        loop = EngineLoop(folder, progress)
        progress.started()
        thread = threading.Thread(target=loop.run, args=(core,), daemon=True)
        thread.start()
        yield api, core, progress
        api.sent.send(encoder.encode(Shutdown()))
        thread.join(5)
        assert not thread.is_alive()
        loop.close()
        api.close()


def test_an_engine_tells_the_limit_of_its_steps_before_it_says_that_it_is_ready(served):
    api, _, progress = served
    told = [m for m in api.messages(0.3) if isinstance(m, EngineReady) or (isinstance(m, Heartbeat) and m.stats)]
    assert isinstance(told[0], Heartbeat) and told[0].limit_s == progress.limit_s
    assert isinstance(told[1], EngineReady)


def test_an_engine_says_how_it_stands_though_its_step_takes_long(served):
    api, core, _ = served
    collect, released = core.executor.collect, threading.Event()
    core.executor.collect = lambda: (released.wait(10), collect())[1]
    api.sent.send(encoder.encode(add_message("a", [5, 6, 7])))
    beats = [message for message in api.messages(2.2) if isinstance(message, Heartbeat)]
    released.set()
    assert len(beats) >= 3
    last = beats[-1]
    assert last.busy_s >= 1.0 and last.stats.running == 1 and last.stats.kv_blocks_used > 0
    assert last.busy_s < last.limit_s


def test_a_message_that_cannot_be_read_costs_its_own_request(served):
    api, _, _ = served
    good = msgspec.to_builtins(add_message("good", [5, 6], max_output=2), builtin_types=(bytes,))
    bad = ["AddRequest", "bad", [5, 6], {"temperature": -3.0}, 2, [2]]
    for frame in (bad, ["AddRequest", "worse"], ["Unknown", 1], "text", [], good):
        api.sent.send(msgspec.msgpack.encode(frame))
    api.sent.send(b"\xff\x00")
    deltas = [d for m in api.messages(1.5) if isinstance(m, Outputs) for d in m.deltas]
    errors = {delta.request_id: delta.error for delta in deltas if delta.error is not None}
    assert set(errors) == {"bad", "worse"} and all(kind == "InvalidRequest" for kind, _ in errors.values())
    assert [token for d in deltas if d.request_id == "good" for token in d.token_ids] == [7, 7]


def test_counts_do_not_fall_when_an_older_word_comes_later():
    metrics = Metrics("m")
    newer, older = (EngineStats(1, 0, 0, 1, 10, steps, 0, 64, 32) for steps in (9, 7))
    for stats in (newer, older, newer):
        metrics.take(stats)
    assert b'anychip_engine_steps_total{model_name="m"} 9.0' in metrics.render()
