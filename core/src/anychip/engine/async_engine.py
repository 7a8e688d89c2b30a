"""The API process's side of the engine: requests out, outputs in, and what happens when the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import zmq
import zmq.asyncio

from anychip.engine.ipc import encoder, from_engine_decoder, output_endpoint, request_endpoint
from anychip.engine.output_processor import OutputProcessor, merge
from anychip.engine.outputs import RequestOutput
from anychip.errors import (
    AnychipError,
    EngineDead,
    EngineHung,
    InvalidRequest,
    RequestAborted,
    RequestTimeout,
    rebuild,
)
from anychip.messages import (
    Abort,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    Heartbeat,
    Outputs,
    Shutdown,
    ToEngine,
)

log = logging.getLogger("anychip.engine")

_GRACE_S = 1.0
"""The engine ends requests at their deadlines; one that is stuck cannot, and this side does so that much later."""


class AsyncEngine:
    """`bind` opens the sockets; the engine process reports itself ready on them."""

    def __init__(self, folder: Path, on_heartbeat: Callable[[Heartbeat], None] = lambda beat: None) -> None:
        self._folder = folder
        self._on_heartbeat = on_heartbeat
        self._context = zmq.asyncio.Context()
        self._queues: dict[str, asyncio.Queue[RequestOutput | AnychipError]] = {}
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._reader: asyncio.Task[None] | None = None
        self.dead: AnychipError | None = None
        self.outputs: OutputProcessor | None = None
        self._on_stats: Callable[[EngineStats], None] = lambda stats: None

    def bind(self) -> None:
        """Opens the sockets, before the engine process starts."""
        # This side connects: a socket that was bound would have nowhere to put a message once the engine is gone, and
        # its sender would wait for ever instead of learning of the death.
        self._to_engine = self._context.socket(zmq.PUSH)
        self._to_engine.setsockopt(zmq.SNDHWM, 0)
        self._to_engine.setsockopt(zmq.RECONNECT_IVL, 5)
        self._to_engine.connect(request_endpoint(self._folder))
        self._from_engine = self._context.socket(zmq.PULL)
        self._from_engine.bind(output_endpoint(self._folder))
        self._reader = asyncio.create_task(self._read())

    async def ready(self) -> EngineReady:
        """Waits for the engine. Raises what kept it from starting."""
        return await self._ready

    @property
    def is_ready(self) -> bool:
        """Whether the engine has reported, and no error."""
        return self._ready.done() and not self._ready.cancelled() and self._ready.exception() is None

    def attach(self, outputs: OutputProcessor, on_stats: Callable[[EngineStats], None]) -> None:
        """Gives the engine what turns tokens into text, once the tokenizer is read, and who hears how it stands."""
        self.outputs = outputs
        self._on_stats = on_stats

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput]:
        """Streams a request's outputs until it is finished. Leaving the loop early aborts it.

        Raises EngineDead when the engine is gone, RequestAborted when the request was aborted elsewhere.
        """
        assert self.outputs is not None, "attach first"
        if self.dead is not None:
            raise self.dead
        if request.request_id in self._queues:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        queue: asyncio.Queue[RequestOutput | AnychipError] = asyncio.Queue()
        self._queues[request.request_id] = queue
        self.outputs.add(request)
        finished, timer = False, self._end_late(request)
        try:
            await self._send(request)
            while not finished:
                items = [await queue.get()]
                while not queue.empty():  # a caller who is slower than the engine gets more at once
                    items.append(queue.get_nowait())
                pieces = [item for item in items if isinstance(item, RequestOutput)]
                if pieces:
                    output = pieces[0] if len(pieces) == 1 else merge(pieces)
                    finished = output.finished
                    yield output
                if isinstance(items[-1], AnychipError):
                    finished = True
                    raise items[-1]
        finally:
            if timer is not None:
                timer.cancel()
            del self._queues[request.request_id]
            if not finished:
                self.outputs.drop(request.request_id)
                self._abort_soon(Abort(request.request_id))

    @property
    def open_requests(self) -> list[str]:
        """Ids of the requests that have not ended."""
        return list(self._queues)

    async def abort(self, request_id: str) -> bool:
        """Ends a request from aside: its caller gets RequestAborted. Returns whether there was one."""
        queue = self._queues.get(request_id)
        if queue is None:
            return False
        queue.put_nowait(RequestAborted(f"request {request_id} was aborted"))
        if self.outputs is not None:
            self.outputs.drop(request_id)
        await self._send(Abort(request_id))
        return True

    def _end_late(self, request: AddRequest) -> asyncio.TimerHandle | None:
        """Ends a request that the engine has not ended at its deadline."""
        if request.deadline is None:
            return None

        def end() -> None:
            queue = self._queues.get(request.request_id)
            if queue is not None and self.outputs is not None:
                self.outputs.drop(request.request_id)
                queue.put_nowait(RequestTimeout(f"request {request.request_id} did not end within its deadline"))
                self._abort_soon(Abort(request.request_id))

        return asyncio.get_running_loop().call_later(request.deadline + _GRACE_S, end)

    def fail(self, error: AnychipError) -> None:
        """The engine is gone: every open request learns why, and so does every later one."""
        if self.dead is None:
            self.dead = error
            if self.is_ready:
                log.error("requests fail from now on: %s", error)
        if not self._ready.done():
            self._ready.set_exception(error)
        for queue in self._queues.values():
            queue.put_nowait(self.dead)

    async def close(self) -> None:
        """Asks the engine to stop and closes the sockets."""
        if self._context.closed:
            return
        if self.dead is None:
            await self._to_engine.send(encoder.encode(Shutdown()))
        if self._reader is not None:
            self._reader.cancel()
        self._context.destroy(linger=200 if self.dead is None else 0)

    async def _send(self, message: ToEngine) -> None:
        await self._to_engine.send(encoder.encode(message))

    def _abort_soon(self, message: Abort) -> None:
        # An async generator that is being closed must not wait.
        if self.dead is None:
            with contextlib.suppress(zmq.ZMQError):
                task = asyncio.ensure_future(self._send(message))
                task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _read(self) -> None:
        """Until the sockets close. An engine that nobody hears is as good as dead, and must not look alive."""
        try:
            await self._read_messages()
        except Exception as error:
            log.exception("the engine's messages cannot be read any more")
            self.fail(EngineDead(f"the engine's message could not be taken in: {type(error).__name__}: {error}"))

    async def _read_messages(self) -> None:
        while True:
            message = from_engine_decoder.decode(await self._from_engine.recv())
            if isinstance(message, EngineReady):
                self._ready.set_result(message)
            elif isinstance(message, EngineFailed):
                error = rebuild(message.error, message.message, message.fault)
                whole = not self._ready.done() or isinstance(error, EngineHung)
                self.fail(error if whole else EngineDead(f"the engine stopped: {error}"))
            elif isinstance(message, Heartbeat):
                self._on_heartbeat(message)
                if message.stats is not None:
                    self._on_stats(message.stats)
            else:
                await self._deliver(message)

    async def _deliver(self, message: Outputs) -> None:
        if message.stats is not None:
            self._on_stats(message.stats)
        for delta in message.deltas:
            queue = self._queues.get(delta.request_id)
            if queue is None or self.outputs is None:
                continue
            if delta.error is not None:
                self.outputs.drop(delta.request_id)
                queue.put_nowait(rebuild(*delta.error))
                continue
            output, ended_here = self.outputs.process(delta)
            if ended_here:
                await self._send(Abort(delta.request_id, delta.index, "stop"))
            if output is not None:
                if delta.finish_reason == "abort":
                    queue.put_nowait(RequestAborted(f"request {delta.request_id} was aborted"))
                else:
                    queue.put_nowait(output)
