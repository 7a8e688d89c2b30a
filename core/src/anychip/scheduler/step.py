"""A step as it leaves the scheduler: the decision for the workers, and who receives its results."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from anychip.drafts import Drafted, Drafts, Speculation
from anychip.kv_cache.manager import KVCacheManager
from anychip.request import Request
from anychip.sampling_params import SamplingParams
from anychip.scheduler.step_room import StepRoom
from anychip.step_messages import AdapterSlot, NewRow, StepDecision

_NO_EDITS = SamplingParams()
"""Beams are chosen by the model's own log-probabilities."""


@dataclass(slots=True)
class ScheduledStep:
    """A decision, and the requests that receive its samples. A request takes results of its own epoch only."""

    requests: list[Request]
    """The decision's rows."""
    drafted: Drafted | None = None
    """What is drafted; None: nothing."""
    num_drafts: list[int] = field(default_factory=list)
    """For each request of `sampling`, how many tokens are drafted behind its last one; []: the step has no drafts."""
    sampling: list[Request] = field(default_factory=list)
    """The rows that sample a token, in the order of the decision's rows."""
    epochs: list[int] = field(default_factory=list)
    """For each request of `sampling`, its epoch at launch."""
    restricted: bool = False
    """Whether anything restricts a token of `sampling`."""
    scoring: dict[int, tuple[Request, int]] = field(default_factory=dict)
    """By position among the decision's rows: the request whose prompt the step scores, and its epoch at launch."""
    pooled: dict[int, tuple[Request, int]] = field(default_factory=dict)
    """The same of requests that the step brings their vectors."""
    proposing: Sequence[tuple[Request, int, int]] = ()
    """The requests that the workers' draft model drafts for behind this step, in the order of the decision's rows:
    with its epoch at launch, and how many tokens."""
    decision: StepDecision = field(init=False)

    @property
    def drafts(self) -> list[list[int]]:
        """For each request of `sampling`, the tokens drafted behind its last one, copied; []: the step has none."""
        if self.drafted is None:
            return []
        token_ids, ends = self.drafted.token_ids.tolist(), accumulate(self.num_drafts)
        return [token_ids[end - count : end] for end, count in zip(ends, self.num_drafts, strict=True)]


class StepDraft:
    """A step while the scheduler fills it. `is_short`: a running request found no blocks, so no other may enter."""

    __slots__ = ("counts", "drafted", "is_short", "new_rows", "num_drafts", "num_proposed", "room", "rows")

    def __init__(self, room: StepRoom) -> None:
        self.room = room
        self.rows: list[Request] = []
        self.counts: list[int] = []
        self.new_rows: list[NewRow] = []
        self.num_drafts: list[int] = []  # by row; []: the step has none
        self.drafted: Drafted | None = None
        self.num_proposed: list[int] = []  # by row; []: the draft model drafts nothing
        self.is_short = False

    def place_ones(self) -> None:
        """The rows so far are running requests' next tokens, whose blocks are there."""
        self.counts = [1] * len(self.rows)
        self.room.take_ones(len(self.rows))
        for request in self.rows:
            if request.enters:  # a beam that has moved
                self._tell_all(request)

    def place(self, request: Request, tokens: int, *, prefill: bool) -> None:
        """Gives a request that has a slot and the blocks so many tokens."""
        self.room.take(tokens, prefill=prefill)
        self.rows.append(request)
        self.counts.append(tokens)
        if request.enters:
            self._tell_all(request)

    def _tell_all(self, request: Request) -> None:
        """The workers hear all of the request with this step."""
        request.enters, request.drawn_in = False, 0
        self.new_rows.append(_new_row(request))

    def place_drafts(self, rows: Sequence[int], drafts: Drafts, lengths: np.ndarray) -> None:
        """Behind the one token of each of the rows, the first tokens of its draft, so many. The blocks are there."""
        token_ids, evidence, left_out = drafts.token_ids, drafts.evidence, drafts.counts - lengths
        if left_out.any():
            parts = np.column_stack((lengths, left_out)).ravel()
            token_ids = token_ids[np.repeat(np.arange(len(parts)) % 2 == 0, parts)]
        requests, counts, num_drafts = self.rows, self.counts, [0] * len(self.rows)
        speculations = []
        for row, length in zip(rows, lengths.tolist(), strict=True):
            if length:
                num_drafts[row] = length
                counts[row] += length
                speculations.append(requests[row].speculation or Speculation(None))
        if speculations:
            some = lengths > 0
            self.drafted = Drafted(speculations, token_ids, lengths[some], evidence[some])
            self.num_drafts = num_drafts
            self.room.take_drafts(self.drafted.counts)

    def to_step(
        self,
        step_id: int,
        kv: KVCacheManager,
        *,
        finished_slots: list[int],
        rewinds: bytes,
        zero_new_blocks: bool,
        adapters: list[AdapterSlot],
        ids_behind: int,
    ) -> ScheduledStep:
        """The step as it is launched: from now on its rows count as computed, and the tokens that it draws as
        promised."""
        rows, counts, drafted, num_drafts = self.rows, self.counts, self.drafted, self.num_drafts
        step = ScheduledStep(rows, drafted=drafted)
        if self.num_proposed:
            step.proposing = [
                (request, request.epoch, count) for request, count in zip(rows, self.num_proposed, strict=True) if count
            ]
        for row, (request, count) in enumerate(zip(rows, counts, strict=True)):
            if request.sampling.prompt_logprobs is not None and request.scores_prompt:
                step.scoring[row] = (request, request.epoch)
            computed = request.num_computed + count
            request.num_computed = computed
            if count > 1 and not (num_drafts and num_drafts[row]):  # of a draft, what is drawn is offered
                kv.offer(request)  # whoever reads it runs in a later step
            if computed >= request.num_prompt + len(request.output_token_ids) + request.num_promised:
                if request.extras is not None and request.pools:
                    step.pooled[row] = (request, request.epoch)
                    continue
                request.num_promised += 1
                request.drawn_in = step_id
                step.sampling.append(request)
                step.epochs.append(request.epoch)
                if request.processors:
                    step.restricted = True
                if num_drafts:
                    step.num_drafts.append(num_drafts[row])
        changes = kv.drain_changes()
        step.decision = StepDecision(
            step_id=step_id,
            slots=array("i", [request.slot or 0 for request in rows]).tobytes(),
            num_tokens=array("i", counts).tobytes(),
            new_rows=self.new_rows,
            new_blocks=array("i", changes.new_blocks).tobytes(),
            finished_slots=finished_slots,
            copies=changes.copies,
            zeros=changes.fresh if zero_new_blocks else [],
            num_drafts=array("i", num_drafts).tobytes(),
            drafts=b"" if drafted is None else drafted.token_ids.tobytes(),
            rewinds=rewinds,
            state_copies=changes.state_copies,
            num_proposed=array("i", self.num_proposed).tobytes() if self.num_proposed else b"",
            adapters=adapters,
            ids_behind=ids_behind,
        )
        return step


def _new_row(request: Request) -> NewRow:
    """A request entering its slot."""
    assert request.slot is not None
    sampling = request.sampling
    edits = _NO_EDITS if request.is_beam else sampling
    return NewRow(
        slot=request.slot,
        token_ids=request.prompt + array("i", request.output_token_ids).tobytes(),
        num_prompt=request.num_prompt,
        num_computed=request.num_computed,
        block_ids=[list(table) for table in request.block_ids],
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=request.seed,
        sample_index=request.index,
        logprobs=request.num_logprobs,
        score_from=len(request.prompt_logprobs) if request.scores_prompt else request.num_prompt,
        score_top=sampling.prompt_logprobs or 0,
        repetition_penalty=edits.repetition_penalty,
        presence_penalty=edits.presence_penalty,
        frequency_penalty=edits.frequency_penalty,
        logit_bias=dict(edits.logit_bias),
        extras=request.extras,
        adapter_slot=request.adapter_slot,
    )
