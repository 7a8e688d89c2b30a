"""What the engine asks of an executor, and what an executor asks of a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from anychip.messages import AdapterReport, DropAdapter, LoadAdapter
from anychip.step_messages import AnyDecision, AnyInputs, AnyResult, LateInputs, StepDecision, StepResult
from anychip.worker_report import WorkerReady


class Executor(Protocol):
    """Steps are launched, sampled and collected in one order: first launched, first collected. With data-parallel lanes
    a step has a decision, late inputs and a result for each."""

    ready: WorkerReady

    def launch(self, decision: AnyDecision) -> None:
        """Starts a step's forward pass. Raises DeviceFault."""
        ...

    def sample(self, late: AnyInputs) -> None:
        """Starts the sampling of the step that was launched last."""
        ...

    def collect(self) -> AnyResult:
        """Waits for the oldest step. Raises DeviceFault when that step failed, EngineDead when a worker is gone,
        EngineHung when one makes no progress."""
        ...

    def load_adapter(self, message: LoadAdapter) -> None:
        """Asks every worker to read an adapter, beside the steps."""
        ...

    def drop_adapter(self, message: DropAdapter) -> None:
        """No later step has the adapter."""
        ...

    def adapter_reports(self) -> list[AdapterReport]:
        """Of the adapters that all workers have read, or that one has refused, since the last call. Does not wait."""
        ...

    def check(self) -> None:
        """Raises EngineDead when a worker is gone. Called while nothing is in flight."""
        ...

    def close(self, reason: str) -> None: ...


class StepWorker(Protocol):
    """A worker as the inline executor and the worker process drive it."""

    ready: WorkerReady

    def launch(self, decision: StepDecision) -> None: ...
    def sample(self, late: LateInputs) -> PendingResult: ...
    def load_adapter(self, message: LoadAdapter, report: Callable[[AdapterReport], None]) -> None: ...
    def drop_adapter(self, message: DropAdapter) -> None: ...
    def close(self, reason: str) -> None: ...


class PendingResult(Protocol):
    """A sampled step on its way to the host."""

    def fetch(self) -> StepResult:
        """Waits for this step, and for no later one."""
        ...
