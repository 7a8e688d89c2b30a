"""One worker in the engine's own process: no hop, no copy."""

from __future__ import annotations

from collections import deque

from anychip.executor.progress import Progress
from anychip.executor.protocol import PendingResult, StepWorker
from anychip.messages import LateInputs, StepDecision, StepResult, WorkerReady


class InlineExecutor:
    """Whoever started this process sees a hang in `progress`, and ends the process."""

    def __init__(self, worker: StepWorker, progress: Progress) -> None:
        self.worker = worker
        self.ready: WorkerReady = worker.ready
        self._progress = progress
        self._pending: deque[PendingResult] = deque()

    def launch(self, decision: StepDecision) -> None:
        self._progress.launching(decision)
        try:
            self.worker.launch(decision)
        except BaseException:
            self._progress.given_up()
            raise

    def sample(self, late: LateInputs) -> None:
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

    def check(self) -> None:
        """The worker lives as long as this process."""

    def close(self, reason: str) -> None:
        self.worker.close(reason)
