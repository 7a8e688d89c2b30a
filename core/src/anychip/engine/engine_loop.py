"""The engine process's loop: messages in, steps, messages out. Every accepted request gets an end."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import zmq

from anychip.engine.engine_core import EngineCore
from anychip.engine.heartbeat import HeartbeatThread
from anychip.engine.ipc import encoder, output_endpoint, request_endpoint, to_engine_decoder
from anychip.errors import InvalidRequest, UserError, fault_of
from anychip.executor.progress import Progress
from anychip.messages import (
    Abort,
    AddRequest,
    DropAdapter,
    EngineFailed,
    EngineReady,
    FromEngine,
    LoadAdapter,
    Outputs,
    SequenceDelta,
    Shutdown,
    ToEngine,
)

log = logging.getLogger("anychip.engine")

_IDLE_POLL_MS = 500
"""An idle engine looks that often whether its workers live."""
_ADAPTER_POLL_MS = 5
"""And, while an adapter is read, whether that is done."""


class EngineLoop:
    """Heartbeats begin at once, and tell how `progress` stands."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._context = zmq.Context()
        self._requests = self._context.socket(zmq.PULL)
        self._requests.bind(request_endpoint(folder))
        self._outputs = self._context.socket(zmq.PUSH)
        self._outputs.connect(output_endpoint(folder))
        self._progress = progress
        self._heartbeat = HeartbeatThread(self._context, folder, progress)
        self._heartbeat.start()
        self._stopping = False

    def send(self, message: FromEngine) -> None:
        self._outputs.send(encoder.encode(message))

    def fail(self, error: BaseException) -> None:
        """The engine's last words."""
        self.send(EngineFailed(type(error).__name__, str(error), fault_of(error)))

    def run(self, core: EngineCore) -> None:
        """Serves until Shutdown."""
        self.send(self._heartbeat.first_beat_of(core))
        self.send(EngineReady(core.executor.ready, core.max_model_len, core.hash_block_size))
        while not self._stopping:
            self._progress.turned()
            deltas = self._take_messages(core, wait=not core.has_work)
            if not core.adapters.is_settled:
                for report in core.tend_adapters():
                    self.send(report)
            if core.has_work:
                deltas += core.step()
            if deltas:
                self.send(Outputs(deltas, core.scheduler.stats))
        core.drain()

    def close(self) -> None:
        self._heartbeat.stop()
        self._context.destroy(linger=1000)

    def _take_messages(self, core: EngineCore, *, wait: bool) -> list[SequenceDelta]:
        deltas: list[SequenceDelta] = []
        if wait and not self._requests.poll(_IDLE_POLL_MS if core.adapters.is_settled else _ADAPTER_POLL_MS):
            core.executor.check()
        while self._requests.poll(0):
            frame = self._requests.recv()
            try:
                message = to_engine_decoder.decode(frame)
            except Exception as error:  # noqa: BLE001 - a process's boundary: a value's own check may raise anything
                deltas += _refusal_of(frame, error)
                continue
            deltas += self._take(core, message)
        return deltas

    def _take(self, core: EngineCore, message: ToEngine) -> list[SequenceDelta]:
        if isinstance(message, AddRequest):
            try:
                core.add(message)
            except UserError as error:
                return [_refused(message.request_id, error)]
        elif isinstance(message, Abort):
            return core.abort(message.request_id, message.index, message.reason)
        elif isinstance(message, LoadAdapter):
            core.adapters.load(message)
        elif isinstance(message, DropAdapter):
            core.adapters.drop(message)
        elif isinstance(message, Shutdown):
            self._stopping = True
        return []


def _refused(request_id: str, error: UserError) -> SequenceDelta:
    return SequenceDelta(request_id, 0, [], finish_reason="abort", error=(type(error).__name__, str(error)))


def _refusal_of(frame: bytes, error: Exception) -> list[SequenceDelta]:
    """What the sender of a message that cannot be read is told: the API process may be of another version. Such a
    message costs its own request, where it says whose it is, and no other."""
    log.error("a message of the API process cannot be read: %s", error)
    try:
        tag, request_id, *_ = msgspec.msgpack.decode(frame, type=list)
    except (msgspec.MsgspecError, ValueError):
        return []
    if tag != AddRequest.__name__ or not isinstance(request_id, str):
        return []
    return [_refused(request_id, InvalidRequest(f"the engine cannot read the request: {error}"))]
