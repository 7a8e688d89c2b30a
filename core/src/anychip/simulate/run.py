"""Lanes of real schedulers on one simulated clock."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from anychip.errors import ConfigError
from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import SequenceDelta
from anychip.request import Request
from anychip.sampling_params import SamplingParams
from anychip.scheduler.policy import SchedulingPolicy
from anychip.scheduler.scheduler import Scheduler
from anychip.scheduler.step import ScheduledStep
from anychip.simulate.costs import Costs, LaneWork, StepTime
from anychip.simulate.traffic import Arrival, Traffic
from anychip.step_messages import StepResult
from anychip.types import RequestId
from anychip.worker_report import DeviceRules, KVCacheConfig, KVGroup

BLOCK_SIZE = 16
_TOKEN = 7
"""What every step draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one lane. The engine's time of a step is `engine_s` and `engine_row_s` for each row; overlap hides it behind
    the device's."""

    cache_tokens: int
    max_rows: int
    max_tokens: int
    stages: int = 1
    """Steps of a lane that are on the device at once, each in another stage."""
    window: int | None = None
    overlap: bool = True
    engine_s: float = 100e-6
    engine_row_s: float = 2.5e-6


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Times in seconds. `first` and `between` have one value a request: to its first token, and the mean between later
    ones."""

    seconds: float = 0.0
    num_steps: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    preemptions: int = 0
    busy: float = 0.0
    """The share of time in which the first stage computed."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of all steps, by part."""


@dataclass(slots=True)
class _Flight:
    """A step on the device, of all lanes."""

    steps: list[ScheduledStep | None]
    ends_at: float


@dataclass(slots=True)
class _Seen:
    arrival: Arrival
    first_at: float | None = None


class Simulation:
    """`num_lanes` schedulers take steps together: a lane without work takes part with an empty one. Requests go to the
    lane with the fewest tokens ahead."""

    def __init__(self, *, costs: Costs, limits: Limits, traffic: Traffic, num_lanes: int = 1) -> None:
        blocks = 1 + limits.cache_tokens // BLOCK_SIZE
        if traffic.longest > (blocks - 1) * BLOCK_SIZE:
            raise ConfigError(
                f"a request has up to {traffic.longest} tokens, and the cache of a lane holds {limits.cache_tokens}"
            )
        self._costs, self._limits, self._traffic = costs, limits, traffic
        self._lanes = [
            Scheduler(
                kv=KVCacheManager(KVCacheConfig(blocks, (KVGroup(BLOCK_SIZE, limits.window),)), prefix_caching=False),
                policy=SchedulingPolicy(),
                rules=DeviceRules(),
                max_num_seqs=limits.max_rows,
                max_num_batched_tokens=limits.max_tokens,
                num_stages=limits.stages,
            )
            for _ in range(num_lanes)
        ]
        self._load = [0] * num_lanes
        self._lane_of: dict[str, int] = {}
        self._seen: dict[str, _Seen] = {}
        self._now = 0.0
        self._stage_free = [0.0] * limits.stages
        self._flights: deque[_Flight] = deque()
        self._outcome = Outcome()
        self._busy_s = 0.0

    def run(self) -> Outcome:
        """Until every request has ended."""
        coming = deque(self._traffic.arrivals())
        depth = self._limits.stages + self._limits.overlap
        while coming or self._flights or any(lane.has_work for lane in self._lanes):
            while coming and coming[0].at <= self._now:
                self._enter(coming.popleft())
            launched = len(self._flights) < depth and self._launch()
            if self._flights and (not launched or len(self._flights) == depth):
                self._take_in(self._flights.popleft())
            elif not self._flights and coming:
                self._now = max(self._now, coming[0].at)
        return self._closed()

    def _enter(self, arrival: Arrival) -> None:
        lane = min(range(len(self._lanes)), key=self._load.__getitem__)
        self._load[lane] += arrival.num_prompt + arrival.num_output
        number = len(self._seen)
        name = RequestId(str(number))
        self._seen[name], self._lane_of[name] = _Seen(arrival), lane
        request = Request(
            request_id=name,
            index=0,
            prompt=bytes(4 * arrival.num_prompt),
            sampling=SamplingParams(max_tokens=arrival.num_output, ignore_eos=True),
            max_output=arrival.num_output,
            stop_ids=frozenset(),
            seed=0,
            arrival=number,
            arrived_at=arrival.at,
        )
        self._lanes[lane].add(request)

    def _launch(self) -> bool:
        """Schedules a step of every lane; False where none has any work. A stage begins it when it is free."""
        steps = [lane.schedule() for lane in self._lanes]
        if not any(steps):
            return False
        work = [self._work(step) for step in steps]
        time = self._costs.step(work)
        self._now += self._limits.engine_s + self._limits.engine_row_s * max(lane.rows for lane in work)
        at, each = self._now, time.total / len(self._stage_free)
        for stage, free in enumerate(self._stage_free):
            at = max(at, free) + each
            self._stage_free[stage] = at
        self._busy_s += each
        self._count(time)
        self._flights.append(_Flight(steps, at))
        return True

    def _work(self, step: ScheduledStep | None) -> LaneWork:
        if step is None:
            return LaneWork()
        counts = memoryview(step.decision.num_tokens).cast("i").tolist()
        rows = tokens = cached = pairs = 0
        for request, count in zip(step.requests, counts, strict=True):
            if self._traffic.phase == "decode" and request.num_computed <= request.num_prompt:
                continue  # its prompt came with its cache
            end = request.num_computed
            seen = end if self._limits.window is None else min(end, self._limits.window + count)
            rows += 1
            tokens += count
            cached += seen
            pairs += count * seen - count * (count - 1) // 2
        return LaneWork(rows=rows, tokens=tokens, cached=cached, pairs=pairs)

    def _count(self, time: StepTime) -> None:
        self._outcome.num_steps += 1
        for part in ("attention", "mlp", "head", "communication"):
            self._outcome.parts[part] = self._outcome.parts.get(part, 0.0) + getattr(time, part)

    def _take_in(self, flight: _Flight) -> None:
        self._now = max(self._now, flight.ends_at)
        for lane, step in zip(self._lanes, flight.steps, strict=True):
            if step is not None:
                ids = array("i", [_TOKEN]) * len(step.sampling)
                for delta in lane.update(step, StepResult(step.decision.step_id, ids.tobytes(), {})):
                    self._hear(delta)

    def _hear(self, delta: SequenceDelta) -> None:
        seen = self._seen[delta.request_id]
        if seen.first_at is None:
            seen.first_at = self._now
            self._outcome.first.append(self._now - seen.arrival.at)
        if delta.finish_reason is not None:
            lane, arrival = self._lane_of[delta.request_id], seen.arrival
            self._load[lane] -= arrival.num_prompt + arrival.num_output
            self._outcome.input_tokens += arrival.num_prompt
            self._outcome.output_tokens += arrival.num_output
            if arrival.num_output > 1:
                self._outcome.between.append((self._now - seen.first_at) / (arrival.num_output - 1))

    def _closed(self) -> Outcome:
        outcome = self._outcome
        outcome.seconds = self._now
        outcome.preemptions = sum(lane.num_preemptions for lane in self._lanes)
        outcome.busy = self._busy_s / self._now if self._now else 0.0
        return outcome
