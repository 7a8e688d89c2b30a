"""A worker process: takes steps from the engine, and returns results where its rank is the one that reports.

A thread of its own waits for results, so that the next step is launched while the device still works on this one.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from dataclasses import dataclass

import msgspec
import zmq

from anychip.environment import Environment
from anychip.errors import AnychipError, DeviceFault, fault_of
from anychip.executor.protocol import PendingResult, StepWorker
from anychip.keyed_sockets import ClusterKey
from anychip.launch.build import load_worker
from anychip.launch.child import end_with_parent, read_spec, show_stacks_when_asked
from anychip.messages import DropAdapter, FromWorker, LoadAdapter, Shutdown, ToWorker, WorkerFailed, WorkerProgress
from anychip.observability.logs import configure_logging
from anychip.process_specs import WorkerSpec
from anychip.step_messages import StepDecision, StepResult

log = logging.getLogger("anychip.worker")

_PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class _Failed:
    """executor.PendingResult of a step that this rank could not do."""

    fault: DeviceFault

    def fetch(self) -> StepResult:
        raise self.fault


@dataclass(frozen=True, slots=True)
class _Flying:
    step_id: int
    pending: PendingResult


class WorkerProcess:
    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._context = zmq.Context()
        assert spec.link is not None, "whoever starts a worker knows where its engine is"
        self._decisions, self._results = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        if spec.link.key_file:
            key = ClusterKey.of_file(spec.link.key_file)
            key.use(self._decisions)
            key.use(self._results)
        self._decisions.connect(spec.link.decisions)
        self._results.connect(spec.link.results)
        self._encoder = msgspec.msgpack.Encoder()
        self._sending = threading.Lock()
        self._flying: queue.SimpleQueue[_Flying | None] = queue.SimpleQueue()
        self._progress_at = 0.0

    def run(self) -> int:
        """Until Shutdown; the exit status."""
        try:
            worker = load_worker(self.spec, self._got_on)
            self._send(worker.ready)
            fetcher = threading.Thread(target=self._fetch, name="results", daemon=True)
            fetcher.start()
            try:
                self._serve(worker)
            finally:
                self._flying.put(None)
                fetcher.join(timeout=10)
                worker.close("shutdown")
        except Exception as error:
            if not isinstance(error, AnychipError):  # expected kinds are printed by the API process, without a trace
                log.exception("worker %d stopped", self.spec.rank)
            self._fail(error)
            return 1
        finally:
            self._context.destroy(linger=1000)
        return 0

    def _serve(self, worker: StepWorker) -> None:
        """A fault that leaves the device usable costs its step alone; the engine asks the other ranks."""
        decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        failed_id = -1
        while not isinstance(message := decoder.decode(self._decisions.recv()), Shutdown):
            if isinstance(message, LoadAdapter):
                worker.load_adapter(message, self._send)
                continue
            if isinstance(message, DropAdapter):
                worker.drop_adapter(message)
                continue
            if message.step_id == failed_id:  # the late inputs of a step that was not launched
                continue
            try:
                if isinstance(message, StepDecision):
                    worker.launch(message)
                else:
                    self._flying.put(_Flying(message.step_id, worker.sample(message)))
            except DeviceFault as fault:
                if fault.fatal:
                    raise
                failed_id = message.step_id
                self._flying.put(_Flying(failed_id, _Failed(fault)))  # reported behind the results before it

    def _fetch(self) -> None:
        try:
            while (flying := self._flying.get()) is not None:
                self._fetch_one(flying)
        except Exception as error:  # noqa: BLE001 - a thread's boundary: reported to the engine
            self._fail(error)

    def _fetch_one(self, flying: _Flying) -> None:
        try:
            result = flying.pending.fetch()
        except DeviceFault as fault:
            if fault.fatal:
                raise
            self._fail(fault, flying.step_id)
        else:
            if self.spec.reports:
                self._send(msgspec.structs.replace(result, lane=self.spec.lane) if self.spec.lane else result)

    def _got_on(self, doing: str) -> None:
        """The start has made progress."""
        now = time.monotonic()
        if now - self._progress_at > _PROGRESS_EVERY_S:
            self._progress_at = now
            self._send(WorkerProgress(self.spec.rank, doing))

    def _fail(self, error: Exception, step_id: int | None = None) -> None:
        self._send(WorkerFailed(self.spec.rank, type(error).__name__, str(error), fault_of(error), step_id))

    def _send(self, message: FromWorker) -> None:
        with self._sending:
            self._results.send(self._encoder.encode(message))


if __name__ == "__main__":
    show_stacks_when_asked()
    configure_logging(Environment.read(child=True))
    worker_spec = msgspec.json.decode(read_spec(), type=WorkerSpec)
    end_with_parent(worker_spec.folder)
    sys.exit(WorkerProcess(worker_spec).run())
