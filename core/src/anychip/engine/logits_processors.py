"""Restrictions on the next token, and how they become the masks that a step's sampling takes.

They run on the host while the device computes the step's forward pass: by then every earlier id is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anychip.errors import AnychipError, InvalidRequest
from anychip.messages import AddRequest
from anychip.request import LogitsProcessor, Request
from anychip.scheduler.lanes import LaneStep
from anychip.scheduler.protocol import LaunchedStep
from anychip.scheduler.step import ScheduledStep
from anychip.step_messages import AnyInputs, LaneInputs, LateInputs
from anychip.types import cdiv

_ALL = np.uint32(0xFFFFFFFF)


class Restriction:
    """A request.LogitsProcessor that forces nothing."""

    def forced(self, request: Request) -> list[int]:
        return []


class MinTokens(Restriction):
    """Forbids the tokens that would end a sequence before it has `min_tokens` of output."""

    name = "min_tokens"

    def __init__(self, *, num_prompt: int, min_tokens: int, stop_ids: Sequence[int]) -> None:
        self.until = num_prompt + min_tokens
        self.stop_ids = np.asarray(stop_ids, dtype=np.int64)

    def applies(self, position: int) -> bool:
        return position < self.until

    def allowed(self, request: Request, drafted: Sequence[int], mask: np.ndarray) -> None:
        clear(mask, self.stop_ids)


class AllowedTokens(Restriction):
    """Forbids every token but some."""

    name = "allowed_token_ids"

    def __init__(self, token_ids: Sequence[int], vocab_size: int) -> None:
        ids = np.asarray(token_ids, dtype=np.int64)
        self.mask = np.zeros(cdiv(vocab_size, 32), dtype=np.uint32)
        np.bitwise_or.at(self.mask, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))

    def applies(self, position: int) -> bool:
        return True

    def allowed(self, request: Request, drafted: Sequence[int], mask: np.ndarray) -> None:
        mask &= self.mask


class BadWords(Restriction):
    """Forbids the token that would complete a word. Words are looked for in the output alone."""

    name = "bad_words"

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        self.words = [(list(word[:-1]), word[-1]) for word in words]

    def applies(self, position: int) -> bool:
        return True

    def allowed(self, request: Request, drafted: Sequence[int], mask: np.ndarray) -> None:
        output = [*request.output_token_ids, *drafted] if drafted else request.output_token_ids
        last = [
            token
            for before, token in self.words
            if len(before) <= len(output) and output[len(output) - len(before) :] == before
        ]
        if last:
            clear(mask, np.asarray(last, dtype=np.int64))


def make_processors(
    message: AddRequest, vocab_size: int, first: Sequence[LogitsProcessor] = ()
) -> tuple[LogitsProcessor, ...]:
    """What restricts one sequence of a request, strongest first: `first` holds its grammar. () for most."""
    sampling, processors = message.sampling, list(first)
    if sampling.allowed_token_ids is not None:
        processors.append(AllowedTokens(sampling.allowed_token_ids, vocab_size))
    if sampling.min_tokens > 0 and message.stop_ids:
        processors.append(
            MinTokens(num_prompt=message.num_prompt, min_tokens=sampling.min_tokens, stop_ids=message.stop_ids)
        )
    if message.bad_token_ids:
        processors.append(BadWords(message.bad_token_ids))
    return tuple(processors)


Failed = list[tuple[Request, AnychipError]]
"""Requests whose restrictions failed."""


def late_inputs(step: LaunchedStep, vocab_size: int) -> tuple[AnyInputs, Failed]:
    """Masks of the rows that have any, and the requests whose restrictions failed. Called when every earlier id of
    those rows is known."""
    if isinstance(step, ScheduledStep):
        return _late_inputs(step, vocab_size)
    assert isinstance(step, LaneStep)
    failed: Failed = []
    lanes: list[LateInputs | None] = []
    for own, decision in zip(step.lanes, step.decision.lanes, strict=True):
        if own is None:
            lanes.append(None if decision is None else LateInputs(decision.step_id, {}))
            continue
        late, wrong = _late_inputs(own, vocab_size)
        lanes.append(late)
        failed += wrong
    return LaneInputs(step.decision.step_id, lanes), failed


def _late_inputs(step: ScheduledStep, vocab_size: int) -> tuple[LateInputs, Failed]:
    masks: dict[int, bytes] = {}
    failed: Failed = []
    sample, drafts = 0, step.drafts if step.restricted else ()
    placed = zip(step.sampling, step.epochs, strict=True) if step.restricted else ()
    for place, (request, epoch) in enumerate(placed):
        draft: Sequence[int] = drafts[place] if drafts else ()
        first, sample = sample, sample + 1 + len(draft)
        if request.epoch != epoch:
            continue  # aborted or preempted since: nobody takes its token
        if request.processors:
            try:
                for at in range(len(draft) + 1):
                    token_position = request.num_known + at
                    active = [p for p in request.processors if p.applies(token_position)]
                    if active:
                        masks[first + at] = _mask(request, draft[:at], active, vocab_size)
            except AnychipError as error:
                failed.append((request, error))
    return LateInputs(step.decision.step_id, masks), failed


def _mask(request: Request, drafted: Sequence[int], active: Sequence[LogitsProcessor], vocab_size: int) -> bytes:
    """A restriction that would leave no token gives way to those before it. The first has none to give way to: raises
    InvalidRequest, since whatever were drawn would break it."""
    mask = _all_tokens(vocab_size)
    for number, processor in enumerate(active):
        before = mask.copy() if number else None
        processor.allowed(request, drafted, mask)
        if mask.any():
            continue
        if before is None and not drafted:
            raise InvalidRequest(
                f"{processor.name} leaves none of the {vocab_size} tokens after {request.num_output} tokens of output"
            )
        mask = _all_tokens(vocab_size) if before is None else before
    return mask.tobytes()


def _all_tokens(vocab_size: int) -> np.ndarray:  # [ceil(vocab_size / 32)] uint32
    mask = np.full(cdiv(vocab_size, 32), _ALL, dtype=np.uint32)
    if vocab_size % 32:
        mask[-1] = (1 << vocab_size % 32) - 1
    return mask


def clear(mask: np.ndarray, ids: np.ndarray) -> None:
    """Forbids tokens in a mask."""
    np.bitwise_and.at(mask, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
