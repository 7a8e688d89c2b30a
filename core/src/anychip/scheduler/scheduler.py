"""Decides each step and takes in its result. Owns requests, slots and their order; blocks are the KV manager's.

There is no prefill phase and no decode phase: a request is behind by some tokens, and a step computes some of
them. Ids that steps in flight will sample count as promised, so the next step is scheduled before they are known.
"""

from __future__ import annotations

import sys
import time
from array import array
from bisect import bisect_left, insort

from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import DeviceRules, EngineStats, NewRow, SequenceDelta, StepDecision, StepResult, TokenLogprobs
from anychip.request import Request, RequestStatus
from anychip.sampling_params import MAX_N
from anychip.scheduler.policy import SchedulingPolicy
from anychip.scheduler.step import ScheduledStep, new_row
from anychip.scheduler.step_room import StepRoom
from anychip.types import FinishReason, RequestId, Slot

assert sys.byteorder == "little", "messages carry little-endian arrays"


class Scheduler:
    def __init__(
        self,
        *,
        kv: KVCacheManager,
        policy: SchedulingPolicy,
        rules: DeviceRules,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.kv = kv
        self.policy = policy
        self.rules = rules
        self.max_rows = max_num_seqs
        self.max_tokens = max_num_batched_tokens
        self.waiting: list[Request] = []  # by policy key
        self.running: list[Request] = []  # by policy key
        self.requests: dict[tuple[RequestId, int], Request] = {}
        self.num_preemptions = self.prefix_queries = self.prefix_hits = 0
        self.waiting_tokens = 0
        """Of the prompts that wait."""
        self._free_slots = [Slot(i) for i in range(max_num_seqs - 1, -1, -1)]
        self._finished_slots: list[int] = []
        self._next_step = 1

    # -- requests -----------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self.requests[request.request_id, request.index] = request
        self.policy.arrived(request)
        self._wait(request)

    def sequences(self, request_id: RequestId) -> list[Request]:
        """A request's sequences that have not ended."""
        first = self.requests.get((request_id, 0))
        count = MAX_N if first is None else first.sampling.num_sequences
        found = (self.requests.get((request_id, index)) for index in range(count))
        return [request for request in found if request is not None]

    def abort(self, request_id: RequestId, index: int) -> bool:
        """Ends a request in any state; steps in flight for it are dropped when they return."""
        request = self.requests.get((request_id, index))
        if request is None:
            return False
        if request.status is RequestStatus.RUNNING:
            self._drop_from(self.running, request)
            self._give_up_slot(request)
            self.kv.free(request)
        else:
            self._drop_from(self.waiting, request)
            self.waiting_tokens -= request.num_prompt
        self._finish(request, "abort")
        return True

    def preempt(self, request: Request) -> None:
        """Takes a running request's blocks and slot; it computes its tokens again when it resumes."""
        self._drop_from(self.running, request)
        self._give_up_slot(request)
        self.kv.offer(request)
        self.kv.free(request)
        request.epoch += 1
        request.num_promised = 0
        request.num_computed = 0
        request.become(RequestStatus.PREEMPTED)
        self._wait(request)
        self.num_preemptions += 1

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def stats(self) -> EngineStats:
        """How things stand now."""
        pool = self.kv.pool
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            waiting_tokens=self.waiting_tokens,
            kv_blocks_used=pool.num_usable - pool.num_free,
            kv_blocks=pool.num_usable,
            steps=self._next_step - 1,
            preemptions=self.num_preemptions,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
        )

    # -- a step out ---------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None when nobody is behind or nobody fits."""
        room = StepRoom(self.rules, self.max_tokens, self.max_rows)
        rows: list[Request] = []
        counts: list[int] = []
        new_rows: list[NewRow] = []
        if self.rules.mix_prefill_decode:
            preempted = self._grow_running(room, rows, counts, new_rows, None)
        else:
            preempted = self._grow_running(room, rows, counts, new_rows, True)
        if not preempted and self.waiting:
            self._admit_waiting(room, rows, counts, new_rows)
        if not rows and not self.rules.mix_prefill_decode:
            self._grow_running(room, rows, counts, new_rows, False)
        if not rows:
            if self._stalled():
                self.preempt(self.running[-1])
                self._admit_waiting(room, rows, counts, new_rows)
            if not rows:
                return None
        return self._step(rows, counts, new_rows)

    def _stalled(self) -> bool:
        """Whether beams wait for beams of theirs that cannot enter: what runs last must make room."""
        return bool(
            self.waiting
            and len(self.running) > 1
            and any(request.beams for request in self.running)
            and not any(request.num_promised for request in self.running)
            and not self.kv.pool.num_deferred
        )

    def _grow_running(
        self, room: StepRoom, rows: list[Request], counts: list[int], new_rows: list[NewRow], only: bool | None
    ) -> bool:
        """Gives running requests their tokens, preempting from the end when blocks are short. `only` restricts
        to prefills (True) or decodes (False). Returns whether anybody was preempted."""
        running, allocate, preempted = self.running, self.kv.allocate, False
        position = 0
        while position < len(running):
            request = running[position]
            position += 1
            if request.beams is not None and request.num_promised:
                continue  # its next token is the search's to choose
            known = len(request.token_ids)
            behind = min(known + request.num_promised, request.num_prompt + request.max_output - 1)
            behind -= request.num_computed
            if behind <= 0:
                continue
            prefill = behind > 1
            if only is not None and prefill != only:
                continue
            granted = room.grant(behind, prefill=prefill)
            if granted <= 0:
                continue
            while not allocate(request, granted):
                # Blocks that steps in flight still touch return soon: waiting beats recomputing.
                if self.kv.pool.num_deferred:
                    granted = 0
                    break
                victim = running[-1]
                self.preempt(victim)
                preempted = True
                if victim is request:
                    granted = 0
                    break
            if granted:
                room.take(granted, prefill=prefill)
                rows.append(request)
                counts.append(granted)
                if request.reenters:
                    request.reenters = False
                    new_rows.append(new_row(request))
        return preempted

    def _admit_waiting(self, room: StepRoom, rows: list[Request], counts: list[int], new_rows: list[NewRow]) -> None:
        admitted: list[Request] = []
        coming = self._coming(rows, counts)
        for request in self.waiting:
            if not self._free_slots or room.tokens_left <= 0 or room.rows_left <= 0:
                break
            if self._waits_for_parent(request):
                continue
            resumed = request.status is RequestStatus.PREEMPTED
            cached = self.kv.start(request)
            if coming and not request.scores_prompt and self.kv.next_full(request) in coming:
                # This very step computes what the request would compute again: a step later it is shared.
                self.kv.cancel_start(request)
                continue
            behind = request.num_known - request.num_computed
            granted = room.grant(behind, prefill=behind > 1)
            if granted <= 0 or not self.kv.allocate(request, granted):
                self.kv.cancel_start(request)
                break
            if not resumed:
                self.policy.started(request)
                request.cached_tokens = cached
                request.scheduled_at = time.monotonic()
                self.prefix_queries += request.num_prompt
                self.prefix_hits += cached
            request.slot = self._free_slots.pop()
            request.become(RequestStatus.RUNNING)
            room.take(granted, prefill=behind > 1)
            if self.kv.prefix_caching:
                coming.update(self.kv.completes(request, granted))
            admitted.append(request)
            rows.append(request)
            counts.append(granted)
            new_rows.append(new_row(request))
        if admitted:
            gone = set(map(id, admitted))
            self.waiting = [request for request in self.waiting if id(request) not in gone]
            for request in admitted:
                self.waiting_tokens -= request.num_prompt
                insort(self.running, request, key=self.policy.key)

    def _coming(self, rows: list[Request], counts: list[int]) -> set[bytes]:
        """Hashes of the blocks that prefills of this step make full."""
        if not self.kv.prefix_caching:
            return set()
        prefills = [(request, count) for request, count in zip(rows, counts, strict=True) if count > 1]
        return {block for request, count in prefills for block in self.kv.completes(request, count)}

    @staticmethod
    def _waits_for_parent(request: Request) -> bool:
        """A fork waits while its parent's prompt is about to be computed, then shares it."""
        parent = request.fork_of
        if parent is None or request.status is RequestStatus.PREEMPTED:
            return False
        if parent.status is RequestStatus.WAITING:
            return True
        return parent.status is RequestStatus.RUNNING and parent.num_computed < parent.num_prompt

    def _step(self, rows: list[Request], counts: list[int], new_rows: list[NewRow]) -> ScheduledStep:
        sampling: list[Request] = []
        epochs: list[int] = []
        scoring: dict[int, tuple[Request, int]] = {}
        for position, (request, count) in enumerate(zip(rows, counts, strict=True)):
            if request.sampling.prompt_logprobs is not None and request.scores_prompt:
                scoring[position] = (request, request.epoch)
            computed = request.num_computed + count
            request.num_computed = computed
            if count > 1:
                self.kv.offer(request)  # whoever reads it runs in a later step
            if computed == len(request.token_ids) + request.num_promised:
                request.num_promised += 1
                sampling.append(request)
                epochs.append(request.epoch)
        changes = self.kv.drain_changes()
        finished, self._finished_slots = self._finished_slots, []
        decision = StepDecision(
            step_id=self._next_step,
            slots=array("i", [request.slot or 0 for request in rows]).tobytes(),
            num_tokens=array("i", counts).tobytes(),
            new_rows=new_rows,
            new_blocks=array("i", changes.new_blocks).tobytes(),
            finished_slots=finished,
            copies=changes.copies,
            zeros=changes.fresh if self.rules.zero_new_blocks else [],
        )
        self.kv.pool.launched(self._next_step)
        self._next_step += 1
        return ScheduledStep(decision, rows, sampling, epochs, scoring)

    # -- a result in --------------------------------------------------------------------------------------

    def update(self, step: ScheduledStep, result: StepResult) -> list[SequenceDelta]:
        """Takes in a step's sampled ids: new tokens for the clients, ends, blocks for the prefix cache."""
        self.kv.pool.retired(result.step_id)
        tokens = array("i")
        tokens.frombytes(result.token_ids)
        deltas: list[SequenceDelta] = []
        for position, (request, epoch) in step.scoring.items():
            if request.epoch == epoch:
                request.prompt_logprobs += result.prompt_logprobs.get(position, [])
        offers, block_size = self.kv.prefix_caching, self.kv.hash_block_size
        for position, (request, epoch, token) in enumerate(zip(step.sampling, step.epochs, tokens, strict=True)):
            if request.epoch != epoch:
                continue
            request.num_promised -= 1
            if request.beams is not None:
                deltas += self._advance_beams(request, result.logprobs[position])
                continue
            token_ids = request.token_ids
            token_ids.append(token)
            known = len(token_ids)
            num_output = known - request.num_prompt
            delta = SequenceDelta(request.request_id, request.index, [token])
            if num_output == 1:
                delta.cached_tokens = request.cached_tokens
                delta.queued_s = request.scheduled_at - request.arrived_at
                if request.sampling.prompt_logprobs is not None and not request.index:
                    delta.prompt_logprobs = request.prompt_logprobs
            if position in result.logprobs:
                delta.logprobs = [result.logprobs[position]]
            deltas.append(delta)
            if offers and ((known - 1) % block_size == 0 or num_output == 1):
                self.kv.offer(request)
            if token in request.stop_ids and num_output >= request.sampling.min_tokens:
                delta.finish_reason = self._end(request, "stop")
            elif num_output >= request.max_output:
                delta.finish_reason = self._end(request, "length")
        return deltas

    def abandon(self, step: ScheduledStep) -> set[RequestId]:
        """Gives up a step that was not carried out, once every earlier one is taken in. Its requests, which are
        returned, cannot go on. Blocks that it was to fill may be on offer already, so the prefix cache is emptied."""
        self.kv.pool.retired(step.decision.step_id)
        self.kv.pool.forget()
        return {request.request_id for request in step.requests}

    def _advance_beams(self, request: Request, likeliest: TokenLogprobs) -> list[SequenceDelta]:
        search = request.beams
        assert search is not None
        ends = search.take(request.index, likeliest, self.kv)
        if ends:
            for beam in search.members:
                self.abort(beam.request_id, beam.index)
        return ends

    def _end(self, request: Request, reason: FinishReason) -> FinishReason:
        self.kv.offer(request)
        self._drop_from(self.running, request)
        self._give_up_slot(request)
        self.kv.free(request)
        self._finish(request, reason)
        return reason

    # -- transitions --------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.epoch += 1
        request.finish_reason = reason
        request.become(RequestStatus.FINISHED)
        self.policy.ended(request)
        del self.requests[request.request_id, request.index]

    def _give_up_slot(self, request: Request) -> None:
        assert request.slot is not None
        self._free_slots.append(request.slot)
        self._finished_slots.append(request.slot)
        request.slot = None

    def _wait(self, request: Request) -> None:
        insort(self.waiting, request, key=self.policy.key)
        self.waiting_tokens += request.num_prompt

    def _drop_from(self, ordered: list[Request], request: Request) -> None:
        position = bisect_left(ordered, self.policy.key(request), key=self.policy.key)
        while ordered[position] is not request:  # equal keys stand together
            position += 1
        del ordered[position]
