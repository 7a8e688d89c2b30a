"""One process per device. Decisions go to every worker, results come from one rank, faults from every rank.

The processes are started by launch/, here or on other hosts; this side notices deaths and hangs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import msgspec
import zmq

from anychip.config import WorkerLink
from anychip.errors import AnychipError, DeviceFault, EngineDead, EngineHung, Fault, rebuild
from anychip.executor.links import Links
from anychip.executor.progress import Progress
from anychip.messages import (
    AdapterReport,
    DropAdapter,
    FromWorker,
    LoadAdapter,
    Shutdown,
    WorkerFailed,
    WorkerProgress,
    WorkerReady,
)
from anychip.step_messages import LateInputs, StepDecision, StepResult

log = logging.getLogger("anychip.engine")

_POLL_S = 0.2
_STACKS_S = 0.3
"""What hung workers have to write their stacks in."""


class ChildProcess(Protocol):
    """A started worker process."""

    pid: int
    """0: it runs on another host."""

    def exit_code(self) -> int | None:
        """None while it runs. Raises EngineDead where nobody can say any more."""
        ...

    def show_stack(self) -> None: ...
    def kill(self) -> None: ...
    def stop(self, deadline_s: float) -> None: ...


class MultiprocessExecutor:
    """`start` launches the worker of a rank, which connects to the sockets that `links` has bound. A rank may be
    `peers_timeout_s` later with a fault than the others."""

    def __init__(
        self,
        *,
        links: Links,
        world_size: int,
        start: Callable[[int, WorkerLink], ChildProcess],
        progress: Progress,
        peers_timeout_s: float,
    ) -> None:
        self._links = links
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._progress = progress
        self._peers_timeout_s = peers_timeout_s
        self._expected: deque[int] = deque()  # ids of the steps in flight
        self._faults: dict[int, list[WorkerFailed]] = {}  # by step
        self._early: deque[StepResult] = deque()  # came while reports of adapters were looked for
        self._reported: dict[bytes, list[AdapterReport]] = {}  # by adapter, of the workers that have spoken
        self._to_workers: list[zmq.Socket[bytes]] = []
        self._children: list[ChildProcess] = []
        try:
            self._results, results = links.bind(zmq.PULL, "results")
            decisions = []
            for rank in range(world_size):
                socket, endpoint = links.bind(zmq.PUSH, f"worker-{rank}")
                self._to_workers.append(socket)
                decisions.append(endpoint)
            for rank in range(world_size):
                self._children.append(start(rank, WorkerLink(decisions[rank], results)))
                progress.pids = tuple(child.pid for child in self._children if child.pid)
            self.ready = self._await_ready(world_size)
        except BaseException:
            self.close("start failed")
            raise

    # -- steps --------------------------------------------------------------------------------------------

    def launch(self, decision: StepDecision) -> None:
        self._progress.launching(decision)
        self._expected.append(decision.step_id)
        self._broadcast(self._encoder.encode(decision))

    def sample(self, late: LateInputs) -> None:
        self._broadcast(self._encoder.encode(late))

    def collect(self) -> StepResult:
        """The oldest step's result. Raises the DeviceFault that all ranks had in it; one of some ranks is fatal."""
        step_id = self._expected[0]
        try:
            result = self._outcome(step_id)
        except BaseException:
            self._progress.collected(done=False)
            raise
        finally:
            self._expected.popleft()
        self._progress.collected()
        return result

    def _outcome(self, step_id: int) -> StepResult:
        waited_s = 0.0
        while True:
            faults = self._faults.get(step_id, ())
            if len(faults) == len(self._children):
                del self._faults[step_id]
                raise _common_fault(faults)
            message = self._early.popleft() if self._early else self._receive()
            if isinstance(message, StepResult):
                if faults or message.step_id != step_id:
                    self._disagree(step_id)
                while any(child.exit_code() is not None for child in self._children):
                    self._receive()  # raises what the worker died of: no step counts without it
                return message
            waited_s = 0.0 if message is not None else waited_s + _POLL_S
            if waited_s > (self._peers_timeout_s if faults else self._progress.limit_s):
                if faults:
                    self._disagree(step_id)
                self._end_hung(waited_s, self._progress.doing, "--step-timeout-s")

    def _disagree(self, step_id: int) -> NoReturn:
        """Ranks that did not do the same steps cannot go on together."""
        faults = self._faults.get(step_id, [])
        which = ", ".join(str(fault.rank) for fault in faults)
        raise DeviceFault(
            f"step {step_id} failed on rank {which} of {len(self._children)} alone: {faults[0].message}"
            if faults
            else f"the workers answered another step than {step_id}",
            kind=faults[0].fault.kind if faults and faults[0].fault is not None else "disagreement",
            fatal=True,
            ranks=[fault.rank for fault in faults],
        )

    # -- adapters -----------------------------------------------------------------------------------------

    def load_adapter(self, message: LoadAdapter) -> None:
        self._broadcast(self._encoder.encode(message))

    def drop_adapter(self, message: DropAdapter) -> None:
        self._broadcast(self._encoder.encode(message))

    def adapter_reports(self) -> list[AdapterReport]:
        while self._results.poll(0):
            message = self._receive()
            if isinstance(message, StepResult):
                self._early.append(message)
        whole = [digest for digest, reports in self._reported.items() if len(reports) == len(self._children)]
        found = []
        for digest in whole:
            reports = self._reported.pop(digest)
            found.append(next((report for report in reports if report.error is not None), reports[0]))
        return found

    # -- life ---------------------------------------------------------------------------------------------

    def _await_ready(self, world_size: int) -> WorkerReady:
        reports: list[WorkerReady] = []
        waited_s = 0.0
        while len(reports) < world_size:
            message = self._receive()
            waited_s = 0.0 if message is not None else waited_s + _POLL_S
            if isinstance(message, WorkerProgress):
                self._progress.start_got_on(f"the start of worker {message.rank}: {message.doing}")
            elif isinstance(message, WorkerReady):
                self._progress.start_got_on(f"the start of {world_size - len(reports) - 1} workers more")
                reports.append(message)
            elif waited_s > self._progress.limit_s:
                missing = world_size - len(reports)
                doing = f"{self._progress.doing}, {missing} of {world_size} are not ready"
                self._end_hung(waited_s, doing, "--start-timeout-s")
        # Ranks may see different free memory; what all can hold is what the engine may use.
        return min(reports, key=lambda report: report.kv.num_blocks)

    def check(self) -> None:
        for rank, child in enumerate(self._children):
            code = child.exit_code()
            if code is not None and not self._results.poll(0):
                raise EngineDead(f"worker {rank} exited with status {code} and left no message")

    def close(self, reason: str) -> None:
        for socket in self._to_workers:
            with contextlib.suppress(zmq.Again):
                socket.send(self._encoder.encode(Shutdown()), zmq.NOBLOCK)
        deadline = time.monotonic() + 5.0
        for child in self._children:
            child.stop(max(0.0, deadline - time.monotonic()))
        self._links.close()

    def _end_hung(self, waited_s: float, doing: str, option: str) -> NoReturn:
        """Ends the workers, whose stacks go to the log: they will not end when asked."""
        for child in self._children:
            child.show_stack()
        time.sleep(_STACKS_S)
        for child in self._children:
            child.kill()
        raise EngineHung(
            f"the workers made no progress for {waited_s:.0f} s, {self._progress.limit_s:.0f} s may pass: {doing}; "
            f"the log has their stacks; raise {option} if that may take so long"
        )

    def _broadcast(self, message: bytes) -> None:
        for socket, child in zip(self._to_workers, self._children, strict=True):
            # A worker that is gone takes no message any more; whoever collects the step learns what it died of.
            while child.exit_code() is None:
                try:
                    socket.send(message, zmq.NOBLOCK)
                    break
                except zmq.Again:
                    socket.poll(int(_POLL_S * 1000), zmq.POLLOUT)

    def _receive(self) -> FromWorker | None:
        """The next message, or None after a poll without one; a step's fault is kept until all ranks have spoken.
        Raises what a worker died of."""
        if not self._results.poll(int(_POLL_S * 1000)):
            self.check()
            return None
        message: FromWorker = self._decoder.decode(self._results.recv())
        if isinstance(message, AdapterReport):
            self._reported.setdefault(message.digest, []).append(message)
        if isinstance(message, WorkerFailed):
            if message.step_id is None:
                raise _error_of(message)
            if self._expected and message.step_id < self._expected[0]:
                self._faults.setdefault(message.step_id, []).append(message)
                self._disagree(message.step_id)
            self._faults.setdefault(message.step_id, []).append(message)
        return message


def _error_of(failed: WorkerFailed) -> AnychipError:
    return rebuild(failed.error, f"worker {failed.rank}: {failed.message}", failed.fault)


def _common_fault(faults: Sequence[WorkerFailed]) -> AnychipError:
    """What all ranks report of one step; the first that is fatal, if any is."""
    known = [failed.fault for failed in faults if failed.fault is not None]
    worst = max(known, key=lambda fault: fault.fatal)
    ranks = tuple(sorted(failed.rank for failed in faults))
    return rebuild(faults[0].error, faults[0].message, Fault(worst.kind, worst.fatal, ranks))
