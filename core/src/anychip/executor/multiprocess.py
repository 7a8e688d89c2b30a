"""One process per device. Decisions go to every worker, results come from one rank, faults from every rank. With
data-parallel lanes, each lane's workers get their own decisions, and one rank of each lane reports.

The processes are started by launch/, here or on other hosts; this side notices deaths and hangs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
from anychip.step_messages import AnyDecision, AnyInputs, AnyResult, LaneDecisions, LaneInputs, LaneResults, StepResult

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


@dataclass(slots=True)
class _Flying:
    """A step in flight, the lanes that have a part in it, and those of their results that have come."""

    step_id: int
    lanes: list[int]
    results: dict[int, StepResult] = field(default_factory=dict)


class MultiprocessExecutor:
    """`start` launches the worker of a rank, which connects to the sockets that `links` has bound. A rank may be
    `peers_timeout_s` later with a fault than the others. Ranks of one of the `num_lanes` lanes are neighbours."""

    def __init__(
        self,
        *,
        links: Links,
        world_size: int,
        start: Callable[[int, WorkerLink], ChildProcess],
        progress: Progress,
        peers_timeout_s: float,
        num_lanes: int = 1,
    ) -> None:
        self._links = links
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._progress = progress
        self._peers_timeout_s = peers_timeout_s
        self._num_lanes, self._ranks_each = num_lanes, world_size // num_lanes
        self._flying: deque[_Flying] = deque()
        self._faults: dict[int, list[WorkerFailed]] = {}  # by step
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

    def launch(self, decision: AnyDecision) -> None:
        self._progress.launching(decision)
        parts = decision.lanes if isinstance(decision, LaneDecisions) else [decision]
        self._flying.append(_Flying(decision.step_id, [lane for lane, part in enumerate(parts) if part is not None]))
        self._tell_lanes(parts)

    def sample(self, late: AnyInputs) -> None:
        self._tell_lanes(late.lanes if isinstance(late, LaneInputs) else [late])

    def _tell_lanes(self, parts: Sequence[object | None]) -> None:
        """Each lane's part to its workers."""
        for lane, part in enumerate(parts):
            if part is not None:
                first = lane * self._ranks_each
                self._send(self._encoder.encode(part), range(first, first + self._ranks_each))

    def collect(self) -> AnyResult:
        """The oldest step's result. Raises the DeviceFault that all ranks had in it; one of some ranks is fatal."""
        step = self._flying[0]
        try:
            self._await(step)
        except BaseException:
            self._progress.collected(done=False)
            raise
        finally:
            self._flying.popleft()
        self._progress.collected()
        if self._num_lanes == 1:
            return step.results[0]
        return LaneResults(step.step_id, [step.results.get(lane) for lane in range(self._num_lanes)])

    def _await(self, step: _Flying) -> None:
        """Until all of the step's results are there."""
        step_id, waited_s = step.step_id, 0.0
        while True:
            faults = self._faults.get(step_id, ())
            if self._failed(step):
                del self._faults[step_id]
                raise _common_fault(faults)
            if faults and step.results:
                self._disagree(step_id)
            if len(step.results) == len(step.lanes):
                while any(child.exit_code() is not None for child in self._children):
                    self._receive()  # raises what the worker died of: no step counts without it
                return
            message = self._receive()
            waited_s = 0.0 if message is not None else waited_s + _POLL_S
            if waited_s > (self._peers_timeout_s if faults else self._progress.limit_s):
                if faults:
                    self._disagree(step_id)
                self._end_hung(waited_s, self._progress.doing, "--step-timeout-s")

    def _failed(self, step: _Flying) -> bool:
        """Whether every rank that has a part in it has failed."""
        return len(self._faults.get(step.step_id, ())) == len(step.lanes) * self._ranks_each

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
            self._receive()
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
        self._send(message, range(len(self._children)))

    def _send(self, message: bytes, ranks: Iterable[int]) -> None:
        for rank in ranks:
            socket, child = self._to_workers[rank], self._children[rank]
            # A worker that is gone takes no message any more; whoever collects the step learns what it died of.
            while child.exit_code() is None:
                try:
                    socket.send(message, zmq.NOBLOCK)
                    break
                except zmq.Again:
                    socket.poll(int(_POLL_S * 1000), zmq.POLLOUT)

    def _receive(self) -> FromWorker | None:
        """The next message, or None after a poll without one; a step's result is kept with it, and its fault until all
        ranks have spoken. Raises what a worker died of."""
        if not self._results.poll(int(_POLL_S * 1000)):
            self.check()
            return None
        message: FromWorker = self._decoder.decode(self._results.recv())
        if isinstance(message, StepResult):
            self._keep(message)
        if isinstance(message, AdapterReport):
            self._reported.setdefault(message.digest, []).append(message)
        if isinstance(message, WorkerFailed):
            if message.step_id is None:
                raise _error_of(message)
            if self._flying and message.step_id < self._flying[0].step_id:
                self._faults.setdefault(message.step_id, []).append(message)
                self._disagree(message.step_id)
            self._faults.setdefault(message.step_id, []).append(message)
        return message

    def _keep(self, result: StepResult) -> None:
        """A lane's results come in the order of its steps. Lanes need not wait for one another."""
        lane = result.lane
        due = next(
            (
                step
                for step in self._flying
                if lane in step.lanes and lane not in step.results and not self._failed(step)
            ),
            None,
        )
        if due is None or due.step_id != result.step_id:
            self._disagree(result.step_id if due is None else due.step_id)
        due.results[lane] = result


def _error_of(failed: WorkerFailed) -> AnychipError:
    return rebuild(failed.error, f"worker {failed.rank}: {failed.message}", failed.fault)


def _common_fault(faults: Sequence[WorkerFailed]) -> AnychipError:
    """What all ranks report of one step; the first that is fatal, if any is."""
    known = [failed.fault for failed in faults if failed.fault is not None]
    worst = max(known, key=lambda fault: fault.fatal)
    ranks = tuple(sorted(failed.rank for failed in faults))
    return rebuild(faults[0].error, faults[0].message, Fault(worst.kind, worst.fatal, ranks))
