"""One worker in the engine's own process: no hop, no copy."""

from __future__ import annotations

from collections import deque

from anychip.executor.protocol import PendingResult, StepWorker
from anychip.messages import LateInputs, StepDecision, StepResult, WorkerReady


class InlineExecutor:
    def __init__(self, worker: StepWorker) -> None:
        self.worker = worker
        self.ready: WorkerReady = worker.ready
        self._pending: deque[PendingResult] = deque()

    def launch(self, decision: StepDecision) -> None:
        self.worker.launch(decision)

    def sample(self, late: LateInputs) -> None:
        self._pending.append(self.worker.sample(late))

    def collect(self) -> StepResult:
        return self._pending.popleft().fetch()

    def check(self) -> None:
        """The worker lives as long as this process."""

    def close(self, reason: str) -> None:
        self.worker.close(reason)
