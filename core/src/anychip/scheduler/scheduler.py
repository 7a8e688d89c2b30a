"""Decides each step and takes in its result. Owns requests, slots and their order; blocks are the KV manager's.

There is no prefill phase and no decode phase: a request is behind by some tokens, and a step computes some of
them. Ids that steps in flight will sample count as promised, so the next step is scheduled before they are known.
"""

from __future__ import annotations

import sys
import time
from bisect import insort
from collections.abc import Iterator

from anychip.engine_stats import EngineStats
from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import SequenceDelta
from anychip.request import Request, RequestStatus
from anychip.scheduler.adapters import AdapterSlots
from anychip.scheduler.beams import Beams
from anychip.scheduler.deltas import delta_of, until_end
from anychip.scheduler.drafting import Drafting
from anychip.scheduler.policy import SchedulingPolicy
from anychip.scheduler.step import ScheduledStep, StepDraft
from anychip.scheduler.step_room import Rows, StepRoom, check_rules
from anychip.scheduler.turns import PipelineTurns
from anychip.scheduler.waiting import WaitingQueue, remove
from anychip.speculation.speculator import Speculator
from anychip.step_messages import ExpertStats, StepResult, TokenLogprobs
from anychip.types import FinishReason, RequestId, Slot
from anychip.worker_report import DeviceRules

assert sys.byteorder == "little", "messages carry little-endian arrays"


class Scheduler:
    """Raises ConfigError for rules and limits under which some request could never be computed."""

    def __init__(
        self,
        *,
        kv: KVCacheManager,
        policy: SchedulingPolicy,
        rules: DeviceRules,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        speculator: Speculator | None = None,
        max_embeddings: int = 0,
        max_adapters: int = 0,
        num_stages: int = 1,
    ) -> None:
        check_rules(rules, max_num_batched_tokens, max_num_seqs)
        self.kv = kv
        self.policy = policy
        self.rules = rules
        self.max_rows = max_num_seqs
        self.max_tokens = max_num_batched_tokens
        takes_drafts = rules.takes_drafts and kv.shares  # a state that took in a token cannot give it back
        self.drafting = Drafting(kv, speculator) if speculator is not None and takes_drafts else None
        self._turns = PipelineTurns(num_stages, self.max_tokens, rules.chunk_multiple) if num_stages > 1 else None
        self._beams = Beams(kv)
        self.adapters = AdapterSlots(max_adapters)
        self.waiting = WaitingQueue(kv, policy, self._beams, self.adapters, max_embeddings)
        self.running: list[Request] = []  # by policy key
        self.requests: dict[RequestId, dict[int, Request]] = {}
        """All requests that have not ended, by id and by index of the sequence."""
        self.num_preemptions = self.prefix_queries = self.prefix_hits = 0
        self._free_slots = [Slot(i) for i in range(max_num_seqs - 1, -1, -1)]
        self._finished_slots: list[int] = []
        self.next_step = 1  # whoever runs several lanes gives their steps one id
        self.experts: ExpertStats | None = None
        """The workers' newest word on the load of experts that may move."""

    # -- requests -----------------------------------------------------------------------------------------

    def add(self, *sequences: Request) -> None:
        """Takes in the sequences of one request. Those of a beam search come together."""
        first = sequences[0]
        if first.is_beam:
            self._beams.begin(sequences)
        known = self.requests.setdefault(first.request_id, {})
        for request in sequences:
            known[request.index] = request
            self.policy.arrived(request)
            self.waiting.add(request)
            if self.drafting is not None and not request.pools:
                self.drafting.arrived(request)

    def sequences(self, request_id: RequestId) -> list[Request]:
        """A request's sequences that have not ended."""
        return list(self.requests.get(request_id, {}).values())

    def all_sequences(self) -> Iterator[Request]:
        """Of all requests that have not ended."""
        return (one for sequences in self.requests.values() for one in sequences.values())

    def abort(self, request_id: RequestId, index: int, reason: FinishReason = "abort") -> bool:
        """Ends a request in any state; steps in flight for it are dropped when they return."""
        request = self.requests.get(request_id, {}).get(index)
        if request is None:
            return False
        if request.status is RequestStatus.RUNNING:
            remove(self.running, request, self.policy.key)
            self._give_up_slot(request)
            self.kv.free(request)
        else:
            self.waiting.remove(request)
        self._finish(request, reason)
        return True

    def preempt(self, request: Request) -> None:
        """Takes a running request's blocks and slot; it computes its tokens again when it resumes."""
        remove(self.running, request, self.policy.key)
        self._give_up_slot(request)
        self.kv.offer(request)
        self.kv.free(request)
        request.epoch += 1
        request.num_promised = 0
        request.num_computed = 0
        request.become(RequestStatus.PREEMPTED)
        self.waiting.add(request)
        self.num_preemptions += 1

    def weights_changed(self) -> None:
        """The next step runs under other weights: what the old ones computed is not shared from now on."""
        self.kv.weights_changed(self.all_sequences())

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def stats(self) -> EngineStats:
        """Counts of the scheduler's requests, tokens and blocks now."""
        pool, states = self.kv.pool, self.kv.states
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            waiting_tokens=self.waiting.num_tokens,
            kv_blocks_used=pool.num_usable - pool.num_free,
            kv_blocks=pool.num_usable,
            steps=self.next_step - 1,
            preemptions=self.num_preemptions,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            speculation=None if self.drafting is None else self.drafting.stats,
            weights_version=self.kv.weights_version,
            experts=self.experts,
            states_used=0 if states is None else states.num_usable - states.num_free,
            states=0 if states is None else states.num_usable,
        )

    # -- a step out ---------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None when nobody is behind or nobody fits."""
        if self.rules.mix_prefill_decode:
            draft = self._draft("any")
        else:
            draft = self._draft("more tokens")
            if not draft.rows:
                draft = self._draft("one token")
        if not draft.rows and self._stalled():
            self.preempt(self.running[-1])
            self.waiting.admit(draft, len(self._free_slots), self._enter)
        return self._step(draft) if draft.rows else None

    def _draft(self, rows: Rows) -> StepDraft:
        tokens = self._turns.tokens(self.running, self.waiting.num_tokens) if self._turns else self.max_tokens
        draft = StepDraft(StepRoom(self.rules, tokens, self.max_rows, rows))
        self._grow_running(draft)
        if self.waiting and not draft.is_short:
            self.waiting.admit(draft, len(self._free_slots), self._enter)
        if self.drafting is not None:
            self.drafting.add_to(draft, self.running)
        return draft

    def _stalled(self) -> bool:
        """Whether beams wait for beams of theirs that cannot enter: what runs last must make room."""
        return bool(
            self.waiting
            and any(request.is_beam for request in self.running)
            and not any(request.num_promised for request in self.running)
            and not self.kv.num_deferred
        )

    def _grow_running(self, draft: StepDraft) -> None:
        """Gives running requests their tokens. Those that decode come first, and chunks of prompts share the rest: a
        long prompt, however urgent, does not make them stand still."""
        running, ones, num_ones = self.running, draft.rows, draft.room.num_ones
        turns, step_id = self._turns, self.next_step
        if turns is not None:
            num_ones = min(num_ones, turns.share(running))
        prefills: list[Request] = []
        position = 0
        while position < len(running):
            request = running[position]
            position += 1
            if request.is_beam and self._beams.waits(request):
                continue
            if turns is not None and turns.waits(request, step_id):
                continue
            num_output, computed = len(request.output_token_ids) + request.num_promised, request.num_computed
            if num_output >= request.max_output:  # its last token is drawn already
                continue
            behind = request.num_prompt + num_output - computed
            if behind == 1:
                if len(ones) < num_ones and (computed < request.next_change_at or self._find_blocks(draft, request, 1)):
                    ones.append(request)
            elif behind > 1:
                prefills.append(request)
        draft.place_ones()
        for request in prefills:
            if request.status is RequestStatus.RUNNING:
                behind = request.num_known + request.num_promised - request.num_computed
                granted = draft.room.grant(behind)
                if granted > 1 and self.kv.checkpoints is not None:
                    granted = draft.room.ending(granted, self.kv.checkpoints.stop(request, request.num_computed))
                if granted and self._find_blocks(draft, request, granted):
                    draft.place(request, granted, prefill=True)

    def _find_blocks(self, draft: StepDraft, request: Request, num_tokens: int) -> bool:
        """Blocks for a running request's next tokens, taken where needed from who runs last and has no place in the
        step yet."""
        while not self.kv.allocate(request, num_tokens):
            if self.drafting is not None and self.drafting.give_back(self.running):
                continue
            draft.is_short = True
            # Blocks that steps in flight still touch return soon: waiting beats recomputing.
            if self.kv.num_deferred:
                return False
            placed = set(draft.rows)
            victim = next(other for other in reversed(self.running) if other not in placed)
            if victim is request and placed:
                return False  # the others go on, and it keeps what it has until one of them needs it
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _enter(self, request: Request, shared: int) -> None:
        """A request that has its blocks gets a slot."""
        if request.status is RequestStatus.WAITING:
            self.policy.started(request)
            request.cached_tokens = shared
            request.scheduled_at = time.monotonic()
            self.prefix_queries += request.num_prompt
            self.prefix_hits += shared
        request.slot = self._free_slots.pop()
        if request.adapter is not None:
            request.adapter_slot = self.adapters.take(request.adapter)
        self.waiting.free_embeddings -= request.num_embedded
        request.enters = True
        request.fork_of = None
        request.become(RequestStatus.RUNNING)
        insort(self.running, request, key=self.policy.key)

    def _step(self, draft: StepDraft) -> ScheduledStep:
        finished, self._finished_slots = self._finished_slots, []
        step_id, self.next_step = self.next_step, self.next_step + 1
        step = draft.to_step(
            step_id,
            self.kv,
            finished_slots=finished,
            rewinds=b"" if self.drafting is None else self.drafting.take_rewinds(),
            zero_new_blocks=self.rules.zero_new_blocks,
            adapters=self.adapters.take_filled(),
            ids_behind=0 if self._turns is None else self._turns.ids_behind(draft.rows, step_id),
        )
        self.kv.launched(step_id)
        return step

    # -- a result in --------------------------------------------------------------------------------------

    def update(self, step: ScheduledStep, result: StepResult) -> list[SequenceDelta]:
        """Takes in a step's sampled ids: new tokens for the clients, ends, blocks for the prefix cache."""
        self.kv.retired(result.step_id)
        tokens = memoryview(result.token_ids).cast("i").tolist()
        num_gained = memoryview(result.num_gained).cast("i").tolist() if result.num_gained else None
        deltas: list[SequenceDelta] = []
        for position, (request, epoch) in step.scoring.items():
            if request.epoch == epoch:
                request.prompt_logprobs += result.prompt_logprobs.get(position, [])
        if step.pooled:
            deltas += self._take_vectors(step, result)
        offers, offer_every = self.kv.prefix_caching, self.kv.offer_every
        drafting = None if step.drafted is None else self.drafting
        end = 0
        for place, (request, epoch) in enumerate(zip(step.sampling, step.epochs, strict=True)):
            first, end = end, end + (1 if num_gained is None else num_gained[place])
            if request.epoch != epoch:
                continue
            request.num_promised -= 1
            if request.is_beam:
                deltas += self._advance_beams(request, result.logprobs[first])
                continue
            output, token = request.output_token_ids, tokens[first]
            gained = [token]
            if num_gained is not None and end > first + 1:
                gained = tokens[first:end]
                if not request.stop_ids.isdisjoint(gained) or len(output) + len(gained) > request.max_output:
                    gained = until_end(request, gained)
                token = gained[-1]
            output += gained
            num_output = len(output)
            reason: FinishReason | None = None
            if token in request.stop_ids and num_output >= request.sampling.min_tokens:
                reason = "stop"
            elif num_output >= request.max_output:
                reason = "length"
            if reason or not request.whole:
                delta = delta_of(request, output if request.whole else gained, reason)
                if first in result.logprobs:
                    delta.logprobs = [result.logprobs[at] for at in range(first, first + len(gained))]
                deltas.append(delta)
            if drafting is not None and request.num_computed >= request.num_prompt + num_output:
                drafting.rewind(request)
            full = (request.num_prompt + num_output - 1) % offer_every < len(gained)
            if offers and (full or num_output == len(gained)):
                self.kv.offer(request)
            if reason:
                self._end(request, reason)
        if drafting is not None:
            drafting.taken_in(step, num_gained or [1] * len(step.sampling))
        if result.proposed and self.drafting is not None and self.drafting.proposing is not None:
            self.drafting.proposing.take(step, result)
        return deltas

    def _take_vectors(self, step: ScheduledStep, result: StepResult) -> list[SequenceDelta]:
        deltas = []
        for position, (request, epoch) in step.pooled.items():
            if request.epoch == epoch:
                delta = delta_of(request, [], "stop")
                delta.vector = result.vectors[position]
                deltas.append(delta)
                self._end(request, "stop")
        return deltas

    def abandon(self, step: ScheduledStep) -> set[RequestId]:
        """Gives up a step that was not carried out, once every earlier one is taken in. Its requests, which are
        returned, cannot go on. Blocks that it was to fill may be on offer already, so the prefix cache is emptied."""
        self.kv.retired(step.decision.step_id)
        self.kv.forget()
        self.adapters.refill(step.decision.adapters)
        return {request.request_id for request in step.requests}

    def _advance_beams(self, request: Request, likeliest: TokenLogprobs) -> list[SequenceDelta]:
        ends = self._beams.take(request, likeliest)
        if ends:
            for member in self.sequences(request.request_id):
                self.abort(member.request_id, member.index, "stop")
        return ends

    def _end(self, request: Request, reason: FinishReason) -> None:
        self.kv.offer(request)
        remove(self.running, request, self.policy.key)
        self._give_up_slot(request)
        self.kv.free(request)
        self._finish(request, reason)

    # -- transitions --------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.epoch += 1
        request.finish_reason = reason
        request.become(RequestStatus.FINISHED)
        self.policy.ended(request)
        if self.drafting is not None:
            self.drafting.ended(request)
        sequences = self.requests[request.request_id]
        del sequences[request.index]
        if not sequences:
            del self.requests[request.request_id]
            self._beams.end(request.request_id)

    def _give_up_slot(self, request: Request) -> None:
        assert request.slot is not None
        if request.adapter is not None:
            self.adapters.release(request.adapter)
        self._free_slots.append(request.slot)
        self._finished_slots.append(request.slot)
        self.waiting.free_embeddings += request.num_embedded
        if self.drafting is not None:
            self.drafting.forget(request.slot)
        request.slot = None
