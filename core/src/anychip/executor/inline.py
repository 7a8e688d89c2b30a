"""One worker in the engine's own process: no hop, no copy."""

from __future__ import annotations

from collections import deque

from anychip.executor.progress import Progress
from anychip.executor.protocol import PendingResult, StepWorker
from anychip.messages import AdapterReport, DropAdapter, LoadAdapter
from anychip.step_messages import AnyDecision, AnyInputs, LateInputs, StepDecision, StepResult
from anychip.worker_report import WorkerReady


class InlineExecutor:
    """Whoever started this process sees a hang in `progress`, and ends the process."""

    def __init__(self, worker: StepWorker, progress: Progress) -> None:
        self.worker = worker
        self.ready: WorkerReady = worker.ready
        self._progress = progress
        self._pending: deque[PendingResult] = deque()
        self._reports: deque[AdapterReport] = deque()  # the worker's thread appends

    def launch(self, decision: AnyDecision) -> None:
        assert isinstance(decision, StepDecision), "lanes take several workers"
        self._progress.launching(decision)
        try:
            self.worker.launch(decision)
        except BaseException:
            self._progress.given_up()
            raise

    def sample(self, late: AnyInputs) -> None:
        assert isinstance(late, LateInputs), "lanes take several workers"
        try:
            self._pending.append(self.worker.sample(late))
        except BaseException:
            self._progress.given_up()
            raise

    def collect(self) -> StepResult:
        try:
            result = self._pending.popleft().fetch()
        except BaseException:
            self._progress.collected(done=False)
            raise
        self._progress.collected()
        return result

    def load_adapter(self, message: LoadAdapter) -> None:
        self.worker.load_adapter(message, self._reports.append)

    def drop_adapter(self, message: DropAdapter) -> None:
        self.worker.drop_adapter(message)

    def adapter_reports(self) -> list[AdapterReport]:
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def check(self) -> None:
        """The worker lives as long as this process."""

    def close(self, reason: str) -> None:
        self.worker.close(reason)
