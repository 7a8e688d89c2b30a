"""Data-parallel lanes: a scheduler and a KV cache for each, and one step over all of them. Decides which lane a request
goes to, where it stays; what a lane's step has is decided by the lane's own scheduler.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from anychip.engine_stats import EngineStats, LaneStats
from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import SequenceDelta
from anychip.request import Request
from anychip.scheduler.scheduler import Scheduler
from anychip.scheduler.step import ScheduledStep
from anychip.step_messages import ExpertStats, LaneDecisions, LaneResults, StepDecision
from anychip.types import FinishReason, RequestId


@dataclass(frozen=True, slots=True)
class LaneStep:
    """The lanes' steps of one id. None: a lane has no rows in it."""

    lanes: list[ScheduledStep | None]
    decision: LaneDecisions
    drafted: None = None  # lanes draft nothing
    proposing: tuple[()] = ()

    @property
    def requests(self) -> Iterable[Request]:
        return chain.from_iterable(step.requests for step in self.lanes if step is not None)

    @property
    def restricted(self) -> bool:
        return any(step.restricted for step in self.lanes if step is not None)


class LaneScheduler:
    """scheduler.protocol.StepScheduler over two schedulers or more. `meeting`: the workers of all lanes meet in every
    step, so a lane without rows is told an empty decision. Otherwise it has no part in the step."""

    def __init__(self, lanes: Sequence[Scheduler], *, meeting: bool) -> None:
        self.lanes = list(lanes)
        self.meeting = meeting
        first = self.lanes[0]
        self.kv: KVCacheManager = first.kv
        self.drafting = first.drafting
        assert all(lane.drafting is None for lane in self.lanes), "lanes draft nothing"
        self.max_tokens, self.max_rows = first.max_tokens, first.max_rows
        self.requests: ChainMap[RequestId, dict[int, Request]] = ChainMap(*[lane.requests for lane in self.lanes])
        self.waiting = _Waiting(self.lanes)
        self.adapters = _Adapters(self.lanes)
        self.experts: ExpertStats | None = None
        self._next_step = 1

    # -- requests -----------------------------------------------------------------------------------------

    def add(self, *sequences: Request) -> None:
        """The sequences of one request stay together: they share blocks."""
        self._lane_for(sequences[0]).add(*sequences)

    def _lane_for(self, request: Request) -> Scheduler:
        """Of the lanes with a free slot, the one that holds the longest prefix of the request; among equals the one
        with least to hold and to compute, and then the first. A lane that has more than a step's tokens beyond the
        least is left out: a prefix that all requests begin with would bring them all to one lane."""
        able = [lane for lane in self.lanes if len(lane.running) + len(lane.waiting) < lane.max_rows] or self.lanes
        loads = [_load(lane) for lane in able]
        most = min(loads) + self.max_tokens
        best, best_rank = able[0], None
        for lane, load in zip(able, loads, strict=True):
            if load <= most:
                rank = (-lane.kv.find_shared(request).num_tokens, load, len(lane.running) + len(lane.waiting))
                if best_rank is None or rank < best_rank:
                    best, best_rank = lane, rank
        return best

    def _lane_of(self, request_id: RequestId) -> Scheduler | None:
        return next((lane for lane in self.lanes if request_id in lane.requests), None)

    def sequences(self, request_id: RequestId) -> list[Request]:
        """Scheduler.sequences."""
        return list(self.requests.get(request_id, {}).values())

    def all_sequences(self) -> Iterator[Request]:
        """Scheduler.all_sequences."""
        return chain.from_iterable(lane.all_sequences() for lane in self.lanes)

    def abort(self, request_id: RequestId, index: int, reason: FinishReason = "abort") -> bool:
        """Scheduler.abort."""
        lane = self._lane_of(request_id)
        return lane is not None and lane.abort(request_id, index, reason)

    def preempt(self, request: Request) -> None:
        """Scheduler.preempt."""
        lane = self._lane_of(request.request_id)
        assert lane is not None, "a request that runs is somewhere"
        lane.preempt(request)

    def weights_changed(self) -> None:
        """Scheduler.weights_changed."""
        for lane in self.lanes:
            lane.weights_changed()

    # -- how they stand -----------------------------------------------------------------------------------

    @property
    def running(self) -> list[Request]:
        return [request for lane in self.lanes for request in lane.running]

    @property
    def num_preemptions(self) -> int:
        return sum(lane.num_preemptions for lane in self.lanes)

    @property
    def has_work(self) -> bool:
        return any(lane.has_work for lane in self.lanes)

    @property
    def stats(self) -> EngineStats:
        """Sums over the lanes, and how each of them stands."""
        each = [lane.stats for lane in self.lanes]
        return EngineStats(
            running=sum(stats.running for stats in each),
            waiting=sum(stats.waiting for stats in each),
            waiting_tokens=sum(stats.waiting_tokens for stats in each),
            kv_blocks_used=sum(stats.kv_blocks_used for stats in each),
            kv_blocks=sum(stats.kv_blocks for stats in each),
            states_used=sum(stats.states_used for stats in each),
            states=sum(stats.states for stats in each),
            steps=self._next_step - 1,
            preemptions=sum(stats.preemptions for stats in each),
            prefix_queries=sum(stats.prefix_queries for stats in each),
            prefix_hits=sum(stats.prefix_hits for stats in each),
            weights_version=each[0].weights_version,
            experts=self.experts,
            lanes=tuple(LaneStats(s.running, s.waiting, s.kv_blocks_used, s.kv_blocks) for s in each),
        )

    # -- a step out, and a result in ----------------------------------------------------------------------

    def schedule(self) -> LaneStep | None:
        """The next step; None where no lane has one."""
        step_id, steps = self._next_step, list[ScheduledStep | None]()
        for lane in self.lanes:
            lane.next_step = step_id
            steps.append(lane.schedule() if lane.has_work else None)
        if not any(step is not None for step in steps):
            return None
        self._next_step += 1
        idle = empty_decision(step_id) if self.meeting else None
        return LaneStep(steps, LaneDecisions(step_id, [idle if step is None else step.decision for step in steps]))

    def update(self, step: LaneStep, result: LaneResults) -> list[SequenceDelta]:
        """Scheduler.update, of the lanes that had rows."""
        deltas: list[SequenceDelta] = []
        for lane, own, found in zip(self.lanes, step.lanes, result.lanes, strict=True):
            if own is not None:
                assert found is not None, "a lane with rows has a result"
                deltas += lane.update(own, found)
        return deltas

    def abandon(self, step: LaneStep) -> set[RequestId]:
        """Scheduler.abandon."""
        lost = set[RequestId]()
        for lane, own in zip(self.lanes, step.lanes, strict=True):
            if own is not None:
                lost |= lane.abandon(own)
        return lost


def empty_decision(step_id: int) -> StepDecision:
    """For workers that have no rows in a step, and meet those that have."""
    return StepDecision(
        step_id=step_id,
        slots=b"",
        num_tokens=b"",
        new_rows=[],
        new_blocks=b"",
        finished_slots=[],
        copies=[],
        zeros=[],
    )


def _load(lane: Scheduler) -> int:
    """Tokens that a lane's requests hold, and those of prompts that wait."""
    pool = lane.kv.pool
    return (pool.num_usable - pool.num_free) * lane.kv.hash_block_size + lane.waiting.num_tokens


@dataclass(frozen=True, slots=True)
class _Waiting:
    """scheduler.protocol.AllWaiting of all lanes."""

    lanes: Sequence[Scheduler]

    @property
    def num_tokens(self) -> int:
        return sum(lane.waiting.num_tokens for lane in self.lanes)

    def __len__(self) -> int:
        return sum(len(lane.waiting) for lane in self.lanes)


@dataclass(frozen=True, slots=True)
class _Adapters:
    """scheduler.protocol.AdapterHolder of all lanes."""

    lanes: Sequence[Scheduler]

    def forget(self, adapter: bytes) -> None:
        for lane in self.lanes:
            lane.adapters.forget(adapter)
