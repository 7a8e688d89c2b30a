"""Steps that workers were told and that nobody has collected: results by lane, faults by rank. Talks to no worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from anychip.errors import AnychipError, DeviceFault, Fault, rebuild
from anychip.messages import WorkerFailed
from anychip.step_messages import AnyResult, LaneResults, StepResult


@dataclass(slots=True, kw_only=True)
class FlyingStep:
    """`lanes` have a part in the step, and so have `num_ranks` ranks."""

    step_id: int
    lanes: Sequence[int]
    num_ranks: int
    results: dict[int, StepResult] = field(default_factory=dict)  # by lane
    faults: list[WorkerFailed] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether all results have come."""
        return len(self.results) == len(self.lanes)

    @property
    def has_failed(self) -> bool:
        """Whether every rank that has a part in it has failed."""
        return len(self.faults) == self.num_ranks

    def failed_on(self, rank: int) -> bool:
        return any(fault.rank == rank for fault in self.faults)

    @property
    def is_disputed(self) -> bool:
        """Whether some ranks have failed, and others have not."""
        return bool(self.faults and self.results)

    def common_fault(self) -> AnychipError:
        """What all ranks report; the first fault that is fatal, if any is."""
        known = [failed.fault for failed in self.faults if failed.fault is not None]
        worst = max(known, key=lambda fault: fault.fatal)
        ranks = tuple(sorted(failed.rank for failed in self.faults))
        return rebuild(self.faults[0].error, self.faults[0].message, Fault(worst.kind, worst.fatal, ranks))


class FlyingSteps:
    """First launched, first collected. Ranks of one of the `num_lanes` lanes are neighbours."""

    def __init__(self, *, num_lanes: int, num_ranks: int) -> None:
        self._num_lanes, self._num_ranks = num_lanes, num_ranks
        self._steps: deque[FlyingStep] = deque()

    def ranks(self, lane: int) -> range:
        """Of a lane."""
        each = self._num_ranks // self._num_lanes
        return range(lane * each, (lane + 1) * each)

    def launched(self, step_id: int, lanes: Sequence[int]) -> None:
        """Workers of these lanes are told a step."""
        num_ranks = len(lanes) * self._num_ranks // self._num_lanes
        self._steps.append(FlyingStep(step_id=step_id, lanes=lanes, num_ranks=num_ranks))

    @property
    def oldest(self) -> FlyingStep:
        return self._steps[0]

    def collected(self) -> None:
        """The oldest is nobody's concern any more."""
        self._steps.popleft()

    def outcome(self, step: FlyingStep) -> AnyResult:
        """Of a step that is done."""
        if self._num_lanes == 1:
            return step.results[0]
        return LaneResults(step.step_id, [step.results.get(lane) for lane in range(self._num_lanes)])

    def take_result(self, result: StepResult) -> None:
        """A lane's results come in the order of its steps, without those in which the rank that reports has failed.
        Lanes need not wait for one another. Raises DeviceFault for another step's than was due."""
        first = self.ranks(result.lane)[0]  # it reports for its lane: several lanes have no stages
        for step in self._steps:
            has_failed = step.failed_on(first) if self._num_lanes > 1 else step.has_failed
            if result.lane in step.lanes and result.lane not in step.results and not has_failed:
                if step.step_id != result.step_id:
                    raise self.disagreement(step)
                step.results[result.lane] = result
                return
        raise self.disagreement(FlyingStep(step_id=result.step_id, lanes=(), num_ranks=0))

    def take_fault(self, failed: WorkerFailed, step_id: int) -> None:
        """Kept until all of the step's ranks have spoken. Raises DeviceFault where others have done the step."""
        step = next((each for each in self._steps if each.step_id == step_id), None)
        if step is None:
            raise self.disagreement(FlyingStep(step_id=step_id, lanes=(), num_ranks=0, faults=[failed]))
        step.faults.append(failed)

    def disagreement(self, step: FlyingStep) -> DeviceFault:
        """Ranks that did not do the same steps cannot go on together."""
        faults = step.faults
        which = ", ".join(str(fault.rank) for fault in faults)
        return DeviceFault(
            f"step {step.step_id} failed on rank {which} of {self._num_ranks} alone: {faults[0].message}"
            if faults
            else f"the workers answered another step than {step.step_id}",
            kind=faults[0].fault.kind if faults and faults[0].fault is not None else "disagreement",
            fatal=True,
            ranks=[fault.rank for fault in faults],
        )
