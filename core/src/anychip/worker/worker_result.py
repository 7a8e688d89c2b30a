"""What a worker gives for a step while the device may still compute it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import msgspec

from anychip.step_messages import ExpertStats, StepResult
from anychip.worker.model_runner import RunnerResult


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """executor.PendingResult of a device: its errors come in anychip's words. The others are StepResult's."""

    explained: Callable[[], AbstractContextManager[None]]
    result: RunnerResult
    proposed: bytes = b""
    experts: ExpertStats | None = None

    def fetch(self) -> StepResult:
        with self.explained():
            result = self.result.fetch()
        if self.proposed or self.experts is not None:
            return msgspec.structs.replace(result, proposed=self.proposed, experts=self.experts)
        return result
