"""A worker process: takes steps from the engine, returns results from rank 0.

A thread of its own waits for results, so that the next step is launched while the device still works on this one.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from pathlib import Path

import msgspec
import zmq

from anychip.config import Environment, WorkerSpec
from anychip.errors import AnychipError
from anychip.executor.multiprocess import decision_endpoint, result_endpoint
from anychip.executor.protocol import PendingResult, StepWorker
from anychip.launch.build import load_worker
from anychip.launch.child import end_with_parent, read_spec
from anychip.messages import FromWorker, LateInputs, StepDecision, ToWorker, WorkerFailed
from anychip.observability.logs import configure_logging

log = logging.getLogger("anychip.worker")


class WorkerProcess:
    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._context = zmq.Context()
        self._decisions = self._context.socket(zmq.PULL)
        self._decisions.connect(decision_endpoint(Path(spec.folder), spec.rank))
        self._results = self._context.socket(zmq.PUSH)
        self._results.connect(result_endpoint(Path(spec.folder)))
        self._encoder = msgspec.msgpack.Encoder()
        self._sending = threading.Lock()
        self._pending: queue.SimpleQueue[PendingResult | None] = queue.SimpleQueue()

    def run(self) -> int:
        """Until Shutdown; the exit status."""
        try:
            worker = load_worker(self.spec)
            self._send(worker.ready)
            fetcher = threading.Thread(target=self._fetch, name="results", daemon=True)
            fetcher.start()
            try:
                self._serve(worker)
            finally:
                self._pending.put(None)
                fetcher.join(timeout=10)
                worker.close("shutdown")
        except Exception as error:
            if not isinstance(error, AnychipError):  # expected kinds are printed by the API process, without a trace
                log.exception("worker %d stopped", self.spec.rank)
            self._send(WorkerFailed(self.spec.rank, type(error).__name__, str(error)))
            return 1
        finally:
            self._context.destroy(linger=1000)
        return 0

    def _serve(self, worker: StepWorker) -> None:
        decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        while True:
            message = decoder.decode(self._decisions.recv())
            if isinstance(message, StepDecision):
                worker.launch(message)
            elif isinstance(message, LateInputs):
                self._pending.put(worker.sample(message))
            else:
                return

    def _fetch(self) -> None:
        try:
            while (pending := self._pending.get()) is not None:
                result = pending.fetch()
                if self.spec.rank == 0:
                    self._send(result)
        except Exception as error:  # noqa: BLE001 - a thread's boundary: reported to the engine
            self._send(WorkerFailed(self.spec.rank, type(error).__name__, str(error)))

    def _send(self, message: FromWorker) -> None:
        with self._sending:
            self._results.send(self._encoder.encode(message))


if __name__ == "__main__":
    configure_logging(Environment.read(child=True))
    worker_spec = msgspec.json.decode(read_spec(), type=WorkerSpec)
    end_with_parent(worker_spec.folder)
    sys.exit(WorkerProcess(worker_spec).run())
