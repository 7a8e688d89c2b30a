"""One process per device. Decisions go to every worker, results come from one rank, faults from every rank. With
data-parallel lanes, each lane's workers get their own decisions, and one rank of each lane reports.

The processes are started by launch/, here or on other hosts; this side notices deaths and hangs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, Protocol

import msgspec
import zmq

from anychip.errors import AnychipError, EngineDead, EngineHung, rebuild
from anychip.executor.flying import FlyingStep, FlyingSteps
from anychip.executor.links import Links
from anychip.executor.progress import Progress
from anychip.messages import AdapterReport, DropAdapter, FromWorker, LoadAdapter, Shutdown, WorkerFailed, WorkerProgress
from anychip.process_specs import WorkerLink
from anychip.step_messages import AnyDecision, AnyInputs, AnyResult, LaneDecisions, LaneInputs, StepResult
from anychip.worker_report import WorkerReady

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
        self._flying = FlyingSteps(num_lanes=num_lanes, num_ranks=world_size)
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
        self._flying.launched(decision.step_id, [lane for lane, part in enumerate(parts) if part is not None])
        self._tell_lanes(parts)

    def sample(self, late: AnyInputs) -> None:
        self._tell_lanes(late.lanes if isinstance(late, LaneInputs) else [late])

    def _tell_lanes(self, parts: Sequence[object | None]) -> None:
        """Each lane's part to its workers."""
        for lane, part in enumerate(parts):
            if part is not None:
                self._send(self._encoder.encode(part), self._flying.ranks(lane))

    def collect(self) -> AnyResult:
        """The oldest step's result. Raises the DeviceFault that all ranks had in it; one of some ranks is fatal."""
        step = self._flying.oldest
        try:
            self._await(step)
        except BaseException:
            self._progress.collected(done=False)
            raise
        finally:
            self._flying.collected()
        self._progress.collected()
        return self._flying.outcome(step)

    def _await(self, step: FlyingStep) -> None:
        """Until all of the step's results are there."""
        waited_s = 0.0
        while True:
            if step.has_failed:
                raise step.common_fault()
            if step.is_disputed:
                raise self._flying.disagreement(step)
            if step.is_done:
                while any(child.exit_code() is not None for child in self._children):
                    self._receive()  # raises what the worker died of: no step counts without it
                return
            message = self._receive()
            waited_s = 0.0 if message is not None else waited_s + _POLL_S
            if waited_s > (self._peers_timeout_s if step.faults else self._progress.limit_s):
                if step.faults:
                    raise self._flying.disagreement(step)
                self._end_hung(waited_s, self._progress.doing, "--step-timeout-s")

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
            self._flying.take_result(message)
        if isinstance(message, AdapterReport):
            self._reported.setdefault(message.digest, []).append(message)
        if isinstance(message, WorkerFailed):
            if message.step_id is None:
                raise _error_of(message)
            self._flying.take_fault(message, message.step_id)
        return message


def _error_of(failed: WorkerFailed) -> AnychipError:
    return rebuild(failed.error, f"worker {failed.rank}: {failed.message}", failed.fault)
