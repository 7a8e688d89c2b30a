"""The engine's loop: launch a step, take in an older one, sample the new one. Owns what is in flight.

Overlap is the depth of a FIFO, not a second code path: with depth 2 a step's forward pass is launched before the
ids of the one before are known; with depth 1 each step is taken in before the next is launched.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Sequence

from anychip.engine.grammars import PendingGrammars
from anychip.engine.logits_processors import LogitEditor, late_inputs, make_processors
from anychip.errors import AnychipError, DeviceFault, InvalidRequest, QueueFull, RequestTimeout, StepFailed
from anychip.executor.protocol import Executor
from anychip.kv_cache.manager import blocks_per_request
from anychip.messages import AddRequest, SequenceDelta
from anychip.request import LogitsProcessor, Request
from anychip.sampling_params import MAX_LOGPROBS
from anychip.scheduler.beam_search import BeamSearch, num_candidates
from anychip.scheduler.scheduler import Scheduler
from anychip.scheduler.step import ScheduledStep
from anychip.types import RequestId

log = logging.getLogger("anychip.engine")

_DEADLINES_EVERY_S = 0.1


class EngineCore:
    """`seed` makes the seeds of requests that bring none reproducible. `grammars` None: no structured output."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        executor: Executor,
        vocab_size: int,
        max_model_len: int,
        max_in_flight: int,
        max_waiting: int,
        max_waiting_tokens: int,
        seed: int,
        grammars: PendingGrammars | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_in_flight = max_in_flight
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens
        self.grammars = grammars
        self.in_flight: deque[ScheduledStep] = deque()
        self._seeds = random.Random(seed)
        self._arrivals = 0
        self._next_look = 0.0  # at deadlines
        self._unreported: list[SequenceDelta] = []

    def add(self, message: AddRequest) -> None:
        """Accepts a request of `n` sequences. Raises UserError, with nothing kept, when it cannot be. One that asks
        for structured output runs once its grammar is compiled."""
        self._check(message)
        wanted = message.sampling.structured
        if wanted is None:
            self._start(message, ())
        elif self.grammars is None:
            raise InvalidRequest("structured output needs the tokenizer, which is off", param=wanted.kind)
        else:
            self.grammars.submit(message, wanted)

    def _check(self, message: AddRequest) -> None:
        sampling, request_id = message.sampling, RequestId(message.request_id)
        if self.scheduler.sequences(request_id) or (self.grammars is not None and request_id in self.grammars):
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        waiting = len(self.scheduler.waiting) + (0 if self.grammars is None else len(self.grammars))
        if waiting + sampling.num_sequences > self.max_waiting:
            raise QueueFull(f"{waiting} requests wait, at most {self.max_waiting} may; try again later")
        waiting_tokens = self.scheduler.waiting_tokens
        if waiting and waiting_tokens + len(message.prompt_token_ids) > self.max_waiting_tokens:
            raise QueueFull(
                f"prompts of {waiting_tokens} tokens wait, at most {self.max_waiting_tokens} may; try again later"
            )
        bad = next((t for t in message.prompt_token_ids if not 0 <= t < self.vocab_size), None)
        if bad is not None or not message.prompt_token_ids:
            what = "is empty" if bad is None else f"holds token id {bad}, the vocabulary has {self.vocab_size}"
            raise InvalidRequest(f"the prompt {what}", param="prompt")
        if sampling.beam_width:
            self._check_beams(message)

    def _check_beams(self, message: AddRequest) -> None:
        width, kv = message.sampling.beam_width, self.scheduler.kv
        length = len(message.prompt_token_ids) + message.max_output
        blocks = width * blocks_per_request(kv.groups, length, self.scheduler.max_tokens)
        if width > self.scheduler.max_rows:
            raise InvalidRequest(f"{width} beams; at most {self.scheduler.max_rows} sequences run", param="beam_width")
        if blocks > kv.pool.num_usable:
            raise InvalidRequest(
                f"{width} beams of {length} tokens may take {blocks} KV blocks, there are {kv.pool.num_usable}; "
                "lower max_tokens or the number of beams",
                param="beam_width",
            )
        if num_candidates(width, len(set(message.stop_ids))) > MAX_LOGPROBS:
            raise InvalidRequest(
                f"{len(message.stop_ids)} stop tokens and {width} beams are {MAX_LOGPROBS} together at most",
                param="stop_token_ids",
            )

    def _start(self, message: AddRequest, grammars: Sequence[LogitsProcessor]) -> None:
        """`grammars` has one for each sequence, or none at all."""
        sampling, stop_ids = message.sampling, frozenset(message.stop_ids)
        seed = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        deadline = math.inf if message.deadline is None else time.monotonic() + message.deadline
        sequences: list[Request] = []
        for index in range(sampling.num_sequences):
            self._arrivals += 1
            request = Request(
                request_id=RequestId(message.request_id),
                index=index,
                prompt_token_ids=list(message.prompt_token_ids),
                sampling=sampling,
                max_output=message.max_output,
                stop_ids=stop_ids,
                seed=seed,
                arrival=self._arrivals,
                priority=message.priority,
                cache_salt=message.cache_salt,
                fork_of=sequences[0] if sequences else None,
                processors=make_processors(message, self.vocab_size, grammars[index : index + 1]),
                editor=LogitEditor(sampling, message.prompt_token_ids) if sampling.edits_logits else None,
                tenant=message.tenant,
                deadline=deadline,
            )
            sequences.append(request)
        if sampling.beam_width:
            search = BeamSearch(sequences)
            for request in sequences:
                request.beams = search
        for request in sequences:
            self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceDelta]:
        """Ends one sequence, or all of a request. Returns their ends; unknown ids are ignored."""
        if self.grammars is not None and self.grammars.cancel(request_id):
            return [SequenceDelta(request_id, 0, [], finish_reason="abort")]
        ends = []
        for request in self.scheduler.sequences(RequestId(request_id)):
            if index in (None, request.index):
                self.scheduler.abort(request.request_id, request.index)
                if request.index < request.sampling.n:  # beams beyond n are nobody's
                    ends.append(SequenceDelta(request.request_id, request.index, [], finish_reason="abort"))
        return ends

    def _fail(self, request_id: str, error: AnychipError) -> None:
        """Ends a request with an error, which the next step reports."""
        self.abort(request_id)
        reason = (type(error).__name__, str(error))
        self._unreported.append(SequenceDelta(request_id, 0, [], finish_reason="abort", error=reason))

    @property
    def has_work(self) -> bool:
        return bool(self.in_flight or self._unreported or self.scheduler.has_work or self.grammars)

    def step(self) -> list[SequenceDelta]:
        """One turn of the loop. Returns what became known."""
        self._start_compiled()
        self._end_late()
        launched = self._launch()
        deltas = self._take_in_oldest(launched)
        self._sample(launched)
        if self._unreported:
            deltas += self._unreported
            self._unreported = []
        return deltas

    def _start_compiled(self) -> None:
        """Requests whose grammars are ready enter; with nothing else to do, waits for one."""
        if not self.grammars:
            return
        idle = not self.in_flight and not self.scheduler.has_work
        for message, grammars, error in self.grammars.ready(wait=idle):
            if error is not None:
                self._fail(message.request_id, error)
            else:
                self._start(message, grammars)

    def _end_late(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _DEADLINES_EVERY_S
        late = {request.request_id for request in self.scheduler.requests.values() if request.deadline < now}
        for request_id in late:
            self._fail(request_id, RequestTimeout("the request did not end within its deadline"))

    def _launch(self) -> ScheduledStep | None:
        if len(self.in_flight) >= self.max_in_flight:
            return None
        step = self.scheduler.schedule()
        if step is None:
            return None
        try:
            self.executor.launch(step.decision)
        except DeviceFault as fault:
            self._give_up(step, fault)
            return None
        self.in_flight.append(step)
        return step

    def _give_up(self, step: ScheduledStep, fault: DeviceFault) -> None:
        """Fails a step's requests, where the device can go on."""
        if fault.fatal:
            raise fault
        log.error("step %d failed: %s", step.decision.step_id, fault)
        self._unreported += self.drain()
        for request_id in self.scheduler.abandon(step):
            self._fail(request_id, StepFailed(str(fault)))

    def _take_in_oldest(self, launched: ScheduledStep | None) -> list[SequenceDelta]:
        waits = launched is None or len(self.in_flight) == self.max_in_flight
        deltas: list[SequenceDelta] = []
        # What restricts or edits the new step's tokens must know every earlier one.
        needs_all = launched is not None and any(r.processors or r.editor is not None for r in launched.sampling)
        while self.in_flight and self.in_flight[0] is not launched and (needs_all or waits):
            oldest = self.in_flight.popleft()
            deltas += self.scheduler.update(oldest, self.executor.collect())
            waits = False
        return deltas

    def _sample(self, launched: ScheduledStep | None) -> None:
        if launched is not None:
            late, failed = late_inputs(launched, self.vocab_size)
            try:
                self.executor.sample(late)
            except DeviceFault as fault:
                self.in_flight.remove(launched)
                self._give_up(launched, fault)
            for request, error in failed:
                self._fail(request.request_id, error)

    def drain(self) -> list[SequenceDelta]:
        """Takes in every step in flight."""
        deltas: list[SequenceDelta] = []
        while self.in_flight:
            deltas += self.scheduler.update(self.in_flight.popleft(), self.executor.collect())
        return deltas

    def close(self, reason: str) -> None:
        if self.grammars is not None:
            self.grammars.close()
        self.executor.close(reason)
