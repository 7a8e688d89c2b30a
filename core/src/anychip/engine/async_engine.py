"""The API process's side of the engine: requests out, outputs in, and what happens when the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from anychip.engine.ipc import encoder, from_engine_decoder, output_endpoint, request_endpoint
from anychip.engine.output_processor import OutputProcessor, receive
from anychip.engine.outputs import Pieces, RequestOutput
from anychip.engine_stats import EngineStats
from anychip.errors import AnychipError, EngineDead, EngineHung, RequestAborted, RequestTimeout, rebuild
from anychip.messages import (
    Abort,
    AdapterReport,
    AddRequest,
    DropAdapter,
    EngineFailed,
    EngineReady,
    Heartbeat,
    LoadAdapter,
    Outputs,
    Shutdown,
    ToEngine,
)

log = logging.getLogger("anychip.engine")

_GRACE_S = 1.0
"""The engine ends requests at their deadlines; one that is stuck cannot, and this side does so that much later."""

_DELTAS_AT_ONCE = 32
"""Deltas of a message after which others have their turn: callers take what has come, connections are served."""


class AsyncEngine:
    """`bind` opens the sockets; the engine process reports itself ready on them.

    The engine knows requests by ids that are made here and never used twice: what it says late of a request that has
    ended reaches nobody. The callers' own ids need not differ.
    """

    def __init__(self, folder: Path, on_heartbeat: Callable[[Heartbeat], None] = lambda beat: None) -> None:
        self._folder = folder
        self._on_heartbeat = on_heartbeat
        self._context = zmq.asyncio.Context()
        self._ids = itertools.count(1)
        self._mailboxes: dict[str, _Mailbox] = {}
        self._adapters: dict[bytes, asyncio.Future[None]] = {}  # those that are being read, by digest
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._reader: asyncio.Task[None] | None = None
        self.dead: AnychipError | None = None
        self.outputs: OutputProcessor | None = None
        self._on_stats: Callable[[EngineStats], None] = lambda stats: None

    def bind(self) -> None:
        """Opens the sockets, before the engine process starts."""
        # This side connects: a socket that was bound would have nowhere to put a message once the engine is gone, and
        # its sender would wait for ever instead of learning of the death. Without a limit, sending never waits.
        self._to_engine: zmq.Socket[bytes] = self._context.socket(zmq.PUSH, socket_class=zmq.Socket)  # type: ignore[arg-type, assignment]
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

        Raises EngineDead when the engine is gone, RequestAborted when the request was aborted elsewhere, OutputFailed
        when its answer could not be made.
        """
        outputs = self.outputs
        assert outputs is not None, "attach first"
        if self.dead is not None:
            raise self.dead
        engine_id = str(next(self._ids))
        log.debug("request %r is %s in the engine", request.request_id, engine_id)
        mailbox = self._mailboxes[engine_id] = _Mailbox(request.request_id)
        ended, timer = False, self._end_late(engine_id, request.deadline)
        try:
            message = msgspec.structs.replace(request, request_id=engine_id)
            outputs.add(message)
            self._send(message)
            while not ended:
                item = await mailbox.take()
                if isinstance(item, AnychipError):
                    ended = True
                    raise item
                if item.finished:
                    ended = True
                    del self._mailboxes[engine_id]
                yield item
        finally:
            if timer is not None:
                timer.cancel()
            self._mailboxes.pop(engine_id, None)
            outputs.drop(engine_id)
            if not ended:
                self._abort(Abort(engine_id))

    @property
    def open_requests(self) -> list[str]:
        """The callers' ids of the requests that have not ended."""
        return [mailbox.request_id for mailbox in self._mailboxes.values()]

    async def abort(self, request_id: str) -> bool:
        """Ends every open request that its caller calls so: the caller gets RequestAborted. Returns whether there was
        one."""
        found = [engine_id for engine_id, mailbox in self._mailboxes.items() if mailbox.request_id == request_id]
        for engine_id in found:
            self._end(engine_id, RequestAborted(f"request {request_id} was aborted"))
        return bool(found)

    async def load_adapter(self, message: LoadAdapter) -> None:
        """Waits until the engine has the adapter. Raises AdapterRefused, or what ended the engine. One load of a digest
        at a time."""
        if self.dead is not None:
            raise self.dead
        loaded = self._adapters[message.digest] = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            await loaded
        finally:
            del self._adapters[message.digest]

    def drop_adapter(self, digest: bytes) -> None:
        """Requests that have the adapter go on, and no other begins with it."""
        if self.dead is None:
            self._send(DropAdapter(digest))

    def _end(self, engine_id: str, error: AnychipError) -> None:
        """Ends an open request from aside."""
        self._mailboxes[engine_id].put(error)
        if self.outputs is not None:
            self.outputs.drop(engine_id)
        self._abort(Abort(engine_id))

    def _end_late(self, engine_id: str, deadline: float | None) -> asyncio.TimerHandle | None:
        """Ends a request that the engine has not ended at its deadline, `deadline` seconds from now."""
        if deadline is None:
            return None

        def end() -> None:
            if engine_id in self._mailboxes:
                self._end(engine_id, RequestTimeout("the request did not end within its deadline"))

        return asyncio.get_running_loop().call_later(deadline + _GRACE_S, end)

    def fail(self, error: AnychipError) -> None:
        """The engine is gone: every open request learns why, and so does every later one."""
        if self.dead is None:
            self.dead = error
            if self.is_ready:
                log.error("requests fail from now on: %s", error)
        if not self._ready.done():
            self._ready.set_exception(error)
        for mailbox in self._mailboxes.values():
            mailbox.put(self.dead)
        for loaded in self._adapters.values():
            if not loaded.done():
                loaded.set_exception(self.dead)

    async def close(self) -> None:
        """Asks the engine to stop and closes the sockets."""
        if self._context.closed:
            return
        if self.dead is None:
            self._send(Shutdown())
        if self._reader is not None:
            self._reader.cancel()
        self._context.destroy(linger=200 if self.dead is None else 0)

    def _send(self, message: ToEngine) -> None:
        self._to_engine.send(encoder.encode(message), zmq.NOBLOCK)

    def _abort(self, message: Abort) -> None:
        if self.dead is None:
            with contextlib.suppress(zmq.ZMQError):  # closed: the engine ends, and its requests with it
                self._send(message)

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
            elif isinstance(message, AdapterReport):
                self._adapter_loaded(message)
            else:
                await self._deliver(message)

    def _adapter_loaded(self, report: AdapterReport) -> None:
        loaded = self._adapters.get(report.digest)
        if loaded is None or loaded.done():
            return
        if report.error is None:
            loaded.set_result(None)
        else:
            loaded.set_exception(rebuild(*report.error))

    async def _deliver(self, message: Outputs) -> None:
        if message.stats is not None:
            self._take_stats(message.stats)
        for number, delta in enumerate(message.deltas, start=1):
            mailbox = self._mailboxes.get(delta.request_id)
            if mailbox is not None and self.outputs is not None:
                received = receive(self.outputs, delta)
                if received.abort is not None:
                    self._abort(received.abort)
                if received.item is not None:
                    mailbox.put(received.item)
            if number % _DELTAS_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _take_stats(self, stats: EngineStats) -> None:
        try:
            self._on_stats(stats)
        except Exception:  # who hears it has failed, and not the engine
            log.exception("the engine's statistics could not be taken in")


class _Mailbox:
    """What has come for one request until its caller takes it. A caller who is slower than the engine gets more at
    once."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._pieces = Pieces()
        self._error: AnychipError | None = None
        self._news = asyncio.Event()

    def put(self, item: RequestOutput | AnychipError) -> None:
        if isinstance(item, AnychipError):
            self._error = self._error or item
        elif item.outputs and item.outputs[0].finish_reason == "abort":
            self._error = self._error or RequestAborted(f"request {self.request_id} was aborted")
        else:
            item.request_id = self.request_id
            self._pieces.add(item)
        self._news.set()

    async def take(self) -> RequestOutput | AnychipError:
        """Waits. The error comes after all that came before it."""
        while True:
            if (output := self._pieces.take()) is not None:
                return output
            if self._error is not None:
                return self._error
            self._news.clear()
            await self._news.wait()
