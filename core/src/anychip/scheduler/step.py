"""A step as it leaves the scheduler: the decision for the workers, and who receives its results."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from anychip.messages import NewRow, StepDecision
from anychip.request import Request
from anychip.sampling_params import SamplingParams

_NO_EDITS = SamplingParams()
"""Beams are chosen by the model's own log-probabilities."""


@dataclass(slots=True)
class ScheduledStep:
    """A decision, and who will receive its samples: a result counts only under the epoch it was launched in."""

    decision: StepDecision
    requests: list[Request]
    """The decision's rows."""
    sampling: list[Request]
    epochs: list[int]
    scoring: dict[int, tuple[Request, int]]
    """By position among the decision's rows: whose prompt tokens it scores, and the epoch."""


def new_row(request: Request) -> NewRow:
    """A request entering its slot."""
    sampling = request.sampling
    edits = sampling if request.beams is None else _NO_EDITS
    return NewRow(
        slot=request.slot if request.slot is not None else -1,
        token_ids=array("i", request.token_ids).tobytes(),
        num_prompt=request.num_prompt,
        num_computed=request.num_computed,
        block_ids=[list(table) for table in request.block_ids],
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=request.seed,
        sample_index=request.index,
        logprobs=_reported(request),
        score_from=len(request.prompt_logprobs) if request.scores_prompt else request.num_prompt,
        score_top=sampling.prompt_logprobs or 0,
        repetition_penalty=edits.repetition_penalty,
        presence_penalty=edits.presence_penalty,
        frequency_penalty=edits.frequency_penalty,
        logit_bias=dict(edits.logit_bias),
    )


def _reported(request: Request) -> int:
    """How many of the likeliest tokens the workers report; -1: none."""
    if request.beams is not None:
        return request.beams.num_candidates
    return -1 if request.sampling.logprobs is None else request.sampling.logprobs
