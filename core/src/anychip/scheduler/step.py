"""A step as it leaves the scheduler: the decision for the workers, and who receives its results."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from anychip.messages import NewRow, StepDecision
from anychip.request import Request
from anychip.sampling_params import SamplingParams
from anychip.scheduler.step_room import StepRoom

_NO_EDITS = SamplingParams()
"""Beams are chosen by the model's own log-probabilities."""


@dataclass(slots=True)
class ScheduledStep:
    """A decision, and the requests that receive its samples. A request takes results of its own epoch only."""

    decision: StepDecision
    requests: list[Request]
    """The decision's rows."""
    sampling: list[Request]
    """The rows that sample a token, in the order of the decision's rows."""
    epochs: list[int]
    """For each request of `sampling`, its epoch at launch."""
    scoring: dict[int, tuple[Request, int]]
    """By position among the decision's rows: the request whose prompt the step scores, and its epoch at launch."""
    drafts: list[Sequence[int]] | None
    """For each request of `sampling`, the tokens drafted behind its last one; None: the step has none."""


class StepDraft:
    """A step while the scheduler fills it. `is_short`: a running request found no blocks, so no other may enter."""

    __slots__ = ("counts", "drafts", "is_short", "new_rows", "room", "rows")

    def __init__(self, room: StepRoom) -> None:
        self.room = room
        self.rows: list[Request] = []
        self.counts: list[int] = []
        self.new_rows: list[NewRow] = []
        self.drafts: dict[int, Sequence[int]] = {}  # by row
        self.is_short = False

    def place(self, request: Request, tokens: int, *, prefill: bool) -> None:
        """Gives a request that has a slot and the blocks so many tokens."""
        self.room.take(tokens, prefill=prefill)
        self.rows.append(request)
        self.counts.append(tokens)
        if request.enters:
            request.enters = False
            self.new_rows.append(_new_row(request))


    def place_draft(self, row: int, draft: Sequence[int]) -> None:
        """Drafts tokens behind a row's one token; the blocks are there."""
        self.room.take_drafts(len(draft))
        self.counts[row] += len(draft)
        self.drafts[row] = draft


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
    )
