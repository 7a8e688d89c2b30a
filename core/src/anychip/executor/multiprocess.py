"""One process per device. Decisions go to every worker, results come from rank 0.

The processes are started by launch/; this side owns the sockets and notices a death.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from anychip.errors import EngineDead, rebuild
from anychip.messages import (
    FromWorker,
    LateInputs,
    Shutdown,
    StepDecision,
    StepResult,
    WorkerFailed,
    WorkerReady,
)

_POLL_MS = 200


class ChildProcess(Protocol):
    """A started worker process."""

    def exit_code(self) -> int | None: ...
    def stop(self, deadline_s: float) -> None: ...


def decision_endpoint(folder: Path, rank: int) -> str:
    return f"ipc://{folder}/worker-{rank}"


def result_endpoint(folder: Path) -> str:
    return f"ipc://{folder}/results"


class MultiprocessExecutor:
    """`start` launches the worker of a rank, which connects to the sockets in `folder`."""

    def __init__(
        self, *, folder: Path, world_size: int, start: Callable[[int], ChildProcess], ready_timeout_s: float
    ) -> None:
        self._context = zmq.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._to_workers: list[zmq.Socket[bytes]] = []
        for rank in range(world_size):
            socket = self._context.socket(zmq.PUSH)
            socket.bind(decision_endpoint(folder, rank))
            self._to_workers.append(socket)
        self._results = self._context.socket(zmq.PULL)
        self._results.bind(result_endpoint(folder))
        self._children: Sequence[ChildProcess] = [start(rank) for rank in range(world_size)]
        try:
            self.ready = self._await_ready(world_size, ready_timeout_s)
        except BaseException:
            self.close("start failed")
            raise

    def _await_ready(self, world_size: int, timeout_s: float) -> WorkerReady:
        reports: list[WorkerReady] = []
        waited_ms = 0.0
        while len(reports) < world_size:
            message = self._receive()
            if message is None:
                waited_ms += _POLL_MS
                if waited_ms > timeout_s * 1000:
                    raise EngineDead(f"{world_size - len(reports)} workers were not ready in {timeout_s:.0f} s")
            elif isinstance(message, WorkerReady):
                reports.append(message)
        # Ranks may see different free memory; what all can hold is what the engine may use.
        return min(reports, key=lambda report: report.kv.num_blocks)

    def launch(self, decision: StepDecision) -> None:
        self._broadcast(self._encoder.encode(decision))

    def sample(self, late: LateInputs) -> None:
        self._broadcast(self._encoder.encode(late))

    def collect(self) -> StepResult:
        while True:
            message = self._receive()
            if isinstance(message, StepResult):
                return message

    def close(self, reason: str) -> None:
        for socket in self._to_workers:
            with contextlib.suppress(zmq.Again):
                socket.send(self._encoder.encode(Shutdown()), zmq.NOBLOCK)
        for child in self._children:
            child.stop(deadline_s=5.0)
        self._context.destroy(linger=0)

    def _broadcast(self, message: bytes) -> None:
        for socket in self._to_workers:
            while True:
                try:
                    socket.send(message, zmq.NOBLOCK)
                    break
                except zmq.Again:  # a worker that is gone takes no message any more
                    self.check()
                    socket.poll(_POLL_MS, zmq.POLLOUT)

    def check(self) -> None:
        for rank, child in enumerate(self._children):
            code = child.exit_code()
            if code is not None and not self._results.poll(0):
                raise EngineDead(f"worker {rank} exited with status {code} and left no message")

    def _receive(self) -> FromWorker | None:
        """The next message, or None after a poll without one. Raises what a worker died of."""
        if not self._results.poll(_POLL_MS):
            self.check()
            return None
        message: FromWorker = self._decoder.decode(self._results.recv())
        if isinstance(message, WorkerFailed):
            raise rebuild(message.kind, f"worker {message.rank}: {message.message}")
        return message
