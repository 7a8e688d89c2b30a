"""The engine's loop: launch a step, take in an older one, sample the new one. Owns what is in flight.

Overlap is the depth of a FIFO, not a second code path: with depth 2 a step's forward pass is launched before the
ids of the one before are known; with depth 1 each step is taken in before the next is launched.
"""

from __future__ import annotations

import random
from collections import deque

from anychip.engine.logits_processors import late_inputs, make_processors
from anychip.errors import InvalidRequest, QueueFull
from anychip.executor.protocol import Executor
from anychip.messages import AddRequest, SequenceDelta
from anychip.request import Request
from anychip.scheduler.scheduler import ScheduledStep, Scheduler
from anychip.types import RequestId


class EngineCore:
    """`seed` makes the seeds of requests that bring none reproducible."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        executor: Executor,
        vocab_size: int,
        max_model_len: int,
        max_in_flight: int,
        max_waiting: int,
        seed: int,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_in_flight = max_in_flight
        self.max_waiting = max_waiting
        self.in_flight: deque[ScheduledStep] = deque()
        self._seeds = random.Random(seed)
        self._arrivals = 0

    def add(self, message: AddRequest) -> None:
        """Accepts a request of `n` sequences. Raises UserError, with nothing kept, when it cannot be."""
        sampling, request_id = message.sampling, RequestId(message.request_id)
        if (request_id, 0) in self.scheduler.requests:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        if len(self.scheduler.waiting) + sampling.n > self.max_waiting:
            raise QueueFull(
                f"{len(self.scheduler.waiting)} requests wait, at most {self.max_waiting} may; try again later"
            )
        bad = next((t for t in message.prompt_token_ids if not 0 <= t < self.vocab_size), None)
        if bad is not None or not message.prompt_token_ids:
            what = "is empty" if bad is None else f"holds token id {bad}, the vocabulary has {self.vocab_size}"
            raise InvalidRequest(f"the prompt {what}", param="prompt")
        stop_ids = frozenset(message.stop_ids)
        seed = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        processors = make_processors(sampling, num_prompt=len(message.prompt_token_ids), stop_ids=stop_ids)
        parent: Request | None = None
        for index in range(sampling.n):
            self._arrivals += 1
            request = Request(
                request_id=request_id,
                index=index,
                prompt_token_ids=list(message.prompt_token_ids),
                sampling=sampling,
                max_output=message.max_output,
                stop_ids=stop_ids,
                seed=seed,
                arrival=self._arrivals,
                priority=message.priority,
                cache_salt=message.cache_salt,
                fork_of=parent,
                processors=processors,
            )
            self.scheduler.add(request)
            parent = parent or request

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceDelta]:
        """Ends one sequence, or all of a request. Returns their ends; unknown ids are ignored."""
        ends = []
        for key in [k for k in self.scheduler.requests if k[0] == request_id and index in (None, k[1])]:
            self.scheduler.abort(*key)
            ends.append(SequenceDelta(key[0], key[1], [], finish_reason="abort"))
        return ends

    @property
    def has_work(self) -> bool:
        return bool(self.in_flight) or self.scheduler.has_work

    def step(self) -> list[SequenceDelta]:
        """One turn of the loop. Returns what became known."""
        launched = self._launch()
        deltas = self._take_in_oldest(launched)
        self._sample(launched)
        return deltas

    def _launch(self) -> ScheduledStep | None:
        if len(self.in_flight) >= self.max_in_flight:
            return None
        step = self.scheduler.schedule()
        if step is not None:
            self.executor.launch(step.decision)
            self.in_flight.append(step)
        return step

    def _take_in_oldest(self, launched: ScheduledStep | None) -> list[SequenceDelta]:
        waits = launched is None or len(self.in_flight) == self.max_in_flight
        if not waits or not self.in_flight or self.in_flight[0] is launched:
            return []
        oldest = self.in_flight.popleft()
        return self.scheduler.update(oldest, self.executor.collect())

    def _sample(self, launched: ScheduledStep | None) -> None:
        if launched is not None:
            self.executor.sample(late_inputs(launched, self.vocab_size))

    def drain(self) -> list[SequenceDelta]:
        """Takes in every step in flight."""
        deltas: list[SequenceDelta] = []
        while self.in_flight:
            deltas += self.scheduler.update(self.in_flight.popleft(), self.executor.collect())
        return deltas

    def close(self, reason: str) -> None:
        self.executor.close(reason)
