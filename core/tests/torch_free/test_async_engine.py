"""The API process's side of the engine, with an engine that says what a test wants it to."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from anychip.engine.async_engine import AsyncEngine
from anychip.engine.ipc import encoder, output_endpoint, request_endpoint, to_engine_decoder
from anychip.engine.output_processor import OutputProcessor
from anychip.engine_stats import EngineStats
from anychip.errors import EngineDead, OutputFailed, RequestAborted
from anychip.launch.folder import private_folder
from anychip.messages import Abort, AddRequest, Outputs, SequenceDelta
from anychip.sampling_params import SamplingParams

STATS = EngineStats(1, 0, 0, 1, 10, 1, 0, 0, 0)


class Engine:
    """The other side. `told` awaits the next message."""

    def __init__(self, folder: Path) -> None:
        self.api = AsyncEngine(folder)
        self.api.bind()
        self.outputs = OutputProcessor(None)
        self.api.attach(self.outputs, lambda stats: None)
        self._context = zmq.asyncio.Context()
        self._requests = self._context.socket(zmq.PULL)
        self._requests.bind(request_endpoint(folder))
        self._outputs = self._context.socket(zmq.PUSH)
        self._outputs.connect(output_endpoint(folder))

    async def told(self):
        return to_engine_decoder.decode(await self._requests.recv())

    async def say(self, *deltas: SequenceDelta, stats: EngineStats | None = None) -> None:
        await self._outputs.send(encoder.encode(Outputs(list(deltas), stats)))

    async def say_raw(self, message: bytes) -> None:
        await self._outputs.send(message)

    async def start(self, name: str, prompt: int = 5, n: int = 1):
        """A request whose first output is awaited, and what the engine calls it."""
        stream = self.api.generate(
            AddRequest(name, array("i", [prompt]).tobytes(), SamplingParams(max_tokens=9, n=n), 9, ())
        )
        first = asyncio.ensure_future(anext(stream))
        message = await self.told()
        assert isinstance(message, AddRequest) and list(message.prompt_token_ids) == [prompt]
        return stream, first, message.request_id

    async def settle(self) -> None:
        """Until what was said so far has been read: a request that is started and ended says so."""
        stream, first, engine_id = await self.start("last")
        await self.say(SequenceDelta(engine_id, 0, [1], finish_reason="length"))
        assert (await first).finished
        await stream.aclose()


def with_engine(test):
    """Runs a test's coroutine."""

    def run() -> None:
        async def main() -> None:
            with private_folder() as folder:
                engine = Engine(Path(folder))
                try:
                    async with asyncio.timeout(20):
                        await test(engine)
                    assert engine.api.open_requests == [] and not engine.outputs._requests, "something is left"
                finally:
                    await engine.api.close()
                    engine._context.destroy(linger=0)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@with_engine
async def test_what_comes_late_for_a_request_never_reaches_another_of_the_same_id(engine):
    first, piece, old = await engine.start("job")
    await engine.say(SequenceDelta(old, 0, [11]))
    assert (await piece).request_id == "job"
    await first.aclose()
    assert await engine.told() == Abort(old)
    second, piece, new = await engine.start("job")
    await engine.say(SequenceDelta(old, 0, [12]), SequenceDelta(old, 0, [], finish_reason="abort"))
    await engine.say(SequenceDelta(new, 0, [13], finish_reason="length"))
    output = await piece
    assert (output.outputs[0].token_ids, output.finished) == ([13], True)
    assert [more async for more in second] == []


@with_engine
async def test_open_requests_of_one_id_each_get_their_own_and_are_aborted_together(engine):
    a, piece_a, id_a = await engine.start("same", 5)
    b, piece_b, id_b = await engine.start("same", 6)
    await engine.say(SequenceDelta(id_b, 0, [2]), SequenceDelta(id_a, 0, [1]))
    assert [(await piece).outputs[0].token_ids for piece in (piece_a, piece_b)] == [[1], [2]]
    assert engine.api.open_requests == ["same", "same"]
    assert not await engine.api.abort("another") and await engine.api.abort("same")
    for stream in (a, b):
        with pytest.raises(RequestAborted, match="request same was aborted"):
            await anext(stream)
    assert {(await engine.told()).request_id for _ in range(2)} == {id_a, id_b}


@with_engine
async def test_a_delta_that_cannot_be_made_into_text_ends_its_own_request_alone(engine):
    process = engine.outputs.process

    def fails(delta):
        if delta.token_ids == [13]:
            raise ValueError("planted")
        return process(delta)

    engine.outputs.process = fails
    good, piece, good_id = await engine.start("good")
    _, failing, bad_id = await engine.start("bad", n=2)
    await engine.say(
        SequenceDelta(bad_id, 1, [13]), SequenceDelta(good_id, 0, [1]), SequenceDelta(bad_id, 0, [13]), stats=STATS
    )
    assert (await piece).outputs[0].token_ids == [1]
    with pytest.raises(OutputFailed, match="ValueError: planted"):
        await failing
    assert await engine.told() == Abort(bad_id)
    await engine.say(SequenceDelta(good_id, 0, [2], finish_reason="length"))
    assert (await anext(good)).finished and engine.api.dead is None


@with_engine
async def test_a_sequence_that_does_not_exist_ends_its_own_request_alone(engine):
    _, failing, engine_id = await engine.start("odd")
    await engine.say(SequenceDelta(engine_id, 7, [13]))
    with pytest.raises(OutputFailed):
        await failing
    await engine.told()
    await engine.settle()


@with_engine
async def test_statistics_that_nobody_can_take_in_end_nothing(engine):
    engine.api.attach(engine.outputs, lambda stats: 1 / 0)
    await engine.say(stats=STATS)
    await engine.settle()
    assert engine.api.dead is None


@with_engine
async def test_a_message_that_cannot_be_decoded_ends_the_engine(engine):
    _, first, _ = await engine.start("a")
    await engine.say_raw(b"\xc1")
    with pytest.raises(EngineDead, match="could not be taken in"):
        await first
    with pytest.raises(EngineDead):
        await anext(engine.api.generate(AddRequest("b", array("i", [1]).tobytes(), SamplingParams(), 9, ())))


@with_engine
async def test_a_caller_who_leaves_before_the_first_token_aborts(engine):
    _, first, engine_id = await engine.start("gone")
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    assert await engine.told() == Abort(engine_id)


@with_engine
async def test_a_slow_reader_gets_all_that_came_meanwhile_and_then_the_error(engine):
    slow, first, engine_id = await engine.start("slow")
    await engine.say(SequenceDelta(engine_id, 0, [0], queued_s=0.5))
    assert (await first).queued_s == 0.5
    for token in range(1, 100):
        await engine.say(SequenceDelta(engine_id, 0, [token]))
    await engine.say(SequenceDelta(engine_id, 0, [], finish_reason="abort", error=("StepFailed", "no memory")))
    await engine.settle()
    assert (await anext(slow)).outputs[0].token_ids == list(range(1, 100))
    with pytest.raises(Exception, match="no memory"):
        await anext(slow)
