"""The engine's loop: launch a step, take in an older one, sample the new one. Owns what is in flight.

Overlap is the depth of a FIFO, not a second code path: with depth 2 a step's forward pass is launched before the
ids of the one before are known; with depth 1 each step is taken in before the next is launched.
"""

from __future__ import annotations

import logging
from collections import deque

from anychip.engine.adapters import EngineAdapters
from anychip.engine.admission import Admission, Refused
from anychip.engine.extras import NO_EXTRAS, ServedExtras
from anychip.engine.grammars import PendingGrammars
from anychip.engine.logits_processors import late_inputs
from anychip.errors import DeviceFault, StepFailed
from anychip.executor.protocol import Executor
from anychip.messages import AdapterReport, AddRequest, SequenceDelta
from anychip.scheduler.protocol import LaunchedStep, StepScheduler
from anychip.types import FinishReason, RequestId

log = logging.getLogger("anychip.engine")


class EngineCore:
    """`seed` makes the seeds of requests that bring none reproducible. `grammars` None: no structured output."""

    def __init__(
        self,
        *,
        scheduler: StepScheduler,
        executor: Executor,
        vocab_size: int,
        max_model_len: int,
        max_in_flight: int,
        max_waiting: int,
        max_waiting_tokens: int,
        seed: int,
        grammars: PendingGrammars | None = None,
        served: ServedExtras = NO_EXTRAS,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_in_flight = max_in_flight
        self.adapters = EngineAdapters(executor, scheduler)
        self.admission = Admission(
            scheduler,
            vocab_size=vocab_size,
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
            seed=seed,
            grammars=grammars,
            served=served,
            adapters=self.adapters,
        )
        self.in_flight: deque[LaunchedStep] = deque()
        self._unreported: list[SequenceDelta] = []

    @property
    def hash_block_size(self) -> int | None:
        """Tokens under one hash of the prefix cache; None: there is none."""
        return self.scheduler.kv.hash_block_size if self.scheduler.kv.prefix_caching else None

    @property
    def weights_version(self) -> int:
        """How often the weights have changed in place since the start."""
        return self.scheduler.kv.weights_version

    def weights_changed(self) -> None:
        """To be called between the last launch of a step under the old weights and the first under the new, on the
        thread that takes the steps. Requests that run go on; nothing that the old weights computed is found again."""
        self.scheduler.weights_changed()

    def add(self, message: AddRequest) -> None:
        """Accepts a request of `n` sequences. Raises UserError, with nothing kept, when it cannot be."""
        self.admission.add(message)

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> list[SequenceDelta]:
        """Ends one sequence, or all of a request; `reason` "stop" for one that is complete. Returns their ends;
        unknown ids are ignored. The beams of a search end together."""
        if self.admission.cancel(RequestId(request_id)):
            return [SequenceDelta(request_id, 0, [], finish_reason=reason)]
        ends = []
        for request in self.scheduler.sequences(RequestId(request_id)):
            if index in (None, request.index) or request.is_beam:
                self.scheduler.abort(request.request_id, request.index, reason)
                if request.index < request.sampling.n:  # beams beyond n are nobody's
                    untold = request.output_token_ids if request.whole else []
                    ends.append(SequenceDelta(request.request_id, request.index, untold, finish_reason=reason))
        return ends

    def tend_adapters(self) -> list[AdapterReport]:
        """Lets go of adapters that leave and that nobody has; what became of those that are read."""
        self.adapters.let_go(self.admission.pending_adapters)
        return self.adapters.poll()

    @property
    def has_work(self) -> bool:
        return bool(self.in_flight or self._unreported or self.scheduler.has_work or self.admission.num_pending)

    def step(self) -> list[SequenceDelta]:
        """One turn of the loop. Returns what became known."""
        self._let_enter()
        launched = self._launch()
        deltas = self._take_in_oldest(launched)
        self._sample(launched)
        self.adapters.let_go(self.admission.pending_adapters)
        return deltas + self._take_unreported()

    def _let_enter(self) -> None:
        """Requests whose grammars are ready enter; those past their deadlines end."""
        idle = not self.in_flight and not self.scheduler.has_work
        self._fail(self.admission.enter_compiled(wait=idle) + self.admission.late())

    def _fail(self, refused: list[Refused]) -> None:
        """Ends requests with errors, which the next step reports."""
        for request_id, error in refused:
            self.abort(request_id)
            reason = (type(error).__name__, str(error))
            self._unreported.append(SequenceDelta(request_id, 0, [], finish_reason="abort", error=reason))

    def _take_unreported(self) -> list[SequenceDelta]:
        unreported, self._unreported = self._unreported, []
        return unreported

    def _launch(self) -> LaunchedStep | None:
        if len(self.in_flight) >= self.max_in_flight or self._waits_for_drafts():
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

    def _waits_for_drafts(self) -> bool:
        """Where its sequences stand is known when a step with drafts is taken in, and drafts need to know it."""
        drafting = self.scheduler.drafting
        if drafting is None or not self.in_flight:
            return False
        if any(step.drafted is not None or step.proposing for step in self.in_flight):
            return True
        return drafting.waits(self.scheduler.running)

    def _give_up(self, step: LaunchedStep, fault: DeviceFault) -> None:
        """Fails a step's requests, where the device can go on."""
        if fault.fatal:
            raise fault
        log.error("step %d failed: %s", step.decision.step_id, fault)
        self._unreported += self.drain()
        self._fail([(request_id, StepFailed(str(fault))) for request_id in self.scheduler.abandon(step)])

    def _take_in_oldest(self, launched: LaunchedStep | None) -> list[SequenceDelta]:
        waits = launched is None or len(self.in_flight) == self.max_in_flight
        deltas: list[SequenceDelta] = []
        # What restricts the new step's tokens must know every earlier one.
        needs_all = launched is not None and launched.restricted
        while self.in_flight and self.in_flight[0] is not launched and (needs_all or waits):
            deltas += self._take_in(self.in_flight.popleft())
            waits = False
        return deltas

    def _sample(self, launched: LaunchedStep | None) -> None:
        if launched is not None:
            late, failed = late_inputs(launched, self.vocab_size)
            try:
                self.executor.sample(late)
            except DeviceFault as fault:
                self.in_flight.remove(launched)
                self._give_up(launched, fault)
            self._fail([(request.request_id, error) for request, error in failed])

    def drain(self) -> list[SequenceDelta]:
        """Takes in every step in flight."""
        deltas: list[SequenceDelta] = []
        while self.in_flight:
            deltas += self._take_in(self.in_flight.popleft())
        return deltas

    def _take_in(self, step: LaunchedStep) -> list[SequenceDelta]:
        try:
            result = self.executor.collect()
        except DeviceFault as fault:
            self._lose(step, fault)
            return []
        if result.experts is not None:
            self.scheduler.experts = result.experts
        return self.scheduler.update(step, result)

    def _lose(self, step: LaunchedStep, fault: DeviceFault) -> None:
        """Fails the requests of a step that was launched and came to nothing, where the device can go on. Later steps
        in flight may read what this one was to write: they return, and nobody waits for them any more."""
        if fault.fatal:
            raise fault
        log.error("step %d failed: %s", step.decision.step_id, fault)
        later = {request.request_id for other in self.in_flight for request in other.requests}
        # An earlier step in flight may have failed too, and ended some of them.
        lost = [one for one in self.scheduler.abandon(step) | later if self.scheduler.sequences(one)]
        self._fail([(request_id, StepFailed(str(fault))) for request_id in lost])

    def close(self, reason: str) -> None:
        self.admission.close()
        self.executor.close(reason)
