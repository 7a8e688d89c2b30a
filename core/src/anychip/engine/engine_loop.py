"""The engine process's loop: messages in, steps, messages out. Every accepted request gets an end."""

from __future__ import annotations

from pathlib import Path

import zmq

from anychip.engine.engine_core import EngineCore
from anychip.engine.ipc import encoder, output_endpoint, request_endpoint, to_engine_decoder
from anychip.errors import UserError
from anychip.messages import (
    Abort,
    AddRequest,
    EngineFailed,
    EngineReady,
    FromEngine,
    Outputs,
    SequenceDelta,
    Shutdown,
)

_IDLE_POLL_MS = 500
"""An idle engine says that often that it lives."""


class EngineLoop:
    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        self._requests = self._context.socket(zmq.PULL)
        self._requests.bind(request_endpoint(folder))
        self._outputs = self._context.socket(zmq.PUSH)
        self._outputs.connect(output_endpoint(folder))
        self._stopping = False

    def send(self, message: FromEngine) -> None:
        self._outputs.send(encoder.encode(message))

    def fail(self, error: BaseException) -> None:
        """The engine's last words."""
        self.send(EngineFailed(type(error).__name__, str(error)))

    def run(self, core: EngineCore) -> None:
        """Serves until Shutdown."""
        self.send(EngineReady(core.executor.ready, core.max_model_len, core.hash_block_size))
        while not self._stopping:
            deltas = self._take_messages(core, wait=not core.has_work)
            if core.has_work:
                deltas += core.step()
            if deltas:
                self.send(Outputs(deltas, core.scheduler.stats))
        core.drain()

    def close(self) -> None:
        self._context.destroy(linger=1000)

    def _take_messages(self, core: EngineCore, *, wait: bool) -> list[SequenceDelta]:
        deltas: list[SequenceDelta] = []
        if wait and not self._requests.poll(_IDLE_POLL_MS):
            core.executor.check()
            self.send(Outputs([], core.scheduler.stats))
        while self._requests.poll(0):
            message = to_engine_decoder.decode(self._requests.recv())
            if isinstance(message, AddRequest):
                try:
                    core.add(message)
                except UserError as error:
                    refusal = (type(error).__name__, str(error))
                    deltas.append(SequenceDelta(message.request_id, 0, [], finish_reason="abort", error=refusal))
            elif isinstance(message, Abort):
                deltas += core.abort(message.request_id, message.index, message.reason)
            elif isinstance(message, Shutdown):
                self._stopping = True
        return deltas
