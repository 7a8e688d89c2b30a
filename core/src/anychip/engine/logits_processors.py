"""Restrictions on the next token and changes to its logits, and how they become what a step's sampling takes.

They run on the host while the device computes the step's forward pass: by then every earlier id is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anychip.errors import AnychipError, InvalidRequest
from anychip.messages import AddRequest, LateInputs, LogitEdits
from anychip.request import LogitsProcessor, Request
from anychip.sampling_params import SamplingParams
from anychip.scheduler.step import ScheduledStep
from anychip.types import cdiv

_ALL = np.uint32(0xFFFFFFFF)


class MinTokens:
    """Forbids the tokens that would end a sequence before it has `min_tokens` of output."""

    name = "min_tokens"

    def __init__(self, *, num_prompt: int, min_tokens: int, stop_ids: Sequence[int]) -> None:
        self.until = num_prompt + min_tokens
        self.stop_ids = np.asarray(stop_ids, dtype=np.int64)

    def applies(self, position: int) -> bool:
        return position < self.until

    def allowed(self, request: Request, position: int, mask: np.ndarray) -> None:
        clear(mask, self.stop_ids)


class AllowedTokens:
    """Forbids every token but some."""

    name = "allowed_token_ids"

    def __init__(self, token_ids: Sequence[int], vocab_size: int) -> None:
        ids = np.asarray(token_ids, dtype=np.int64)
        self.mask = np.zeros(cdiv(vocab_size, 32), dtype=np.uint32)
        np.bitwise_or.at(self.mask, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))

    def applies(self, position: int) -> bool:
        return True

    def allowed(self, request: Request, position: int, mask: np.ndarray) -> None:
        mask &= self.mask


class BadWords:
    """Forbids the token that would complete a word. Words are looked for in the output alone."""

    name = "bad_words"

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        self.words = [(list(word[:-1]), word[-1]) for word in words]

    def applies(self, position: int) -> bool:
        return True

    def allowed(self, request: Request, position: int, mask: np.ndarray) -> None:
        output = request.output_token_ids
        last = [
            token
            for before, token in self.words
            if len(before) <= len(output) and output[len(output) - len(before) :] == before
        ]
        if last:
            clear(mask, np.asarray(last, dtype=np.int64))


class LogitEditor:
    """Penalties and biases of one sequence: one entry for each token that any of them touches, kept up to date by
    the tokens that are new since the last step."""

    def __init__(self, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._repetition = sampling.repetition_penalty
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._index: dict[int, int] = {}
        self._drawn: set[int] = set()
        self._seen = 0
        self._ids = np.zeros(256, dtype=np.int32)
        self._scales = np.ones(256, dtype=np.float32)
        self._shifts = np.zeros(256, dtype=np.float32)
        for token, bias in sampling.logit_bias.items():
            entry = self._entry(token)
            self._shifts[entry] += bias
        if self._repetition != 1:
            for token in set(prompt_token_ids):
                entry = self._entry(token)
                self._scales[entry] = self._repetition

    def edits(self, request: Request) -> LogitEdits | None:
        """What the next token's logits need, where every earlier id of the request is known."""
        if self._repetition != 1 or self._presence or self._frequency:
            for token in request.output_token_ids[self._seen :]:
                self._count(token)
            self._seen = request.num_output
        used = len(self._index)
        if not used:
            return None
        return LogitEdits(self._ids[:used].tobytes(), self._scales[:used].tobytes(), self._shifts[:used].tobytes())

    def _count(self, token: int) -> None:
        entry = self._entry(token)
        self._scales[entry] = self._repetition
        self._shifts[entry] -= self._frequency
        if token not in self._drawn:
            self._drawn.add(token)
            self._shifts[entry] -= self._presence

    def _entry(self, token: int) -> int:
        entry = self._index.setdefault(token, len(self._index))
        if entry == len(self._ids):
            more = np.zeros(entry, dtype=np.int32)
            self._ids = np.concatenate((self._ids, more))
            self._scales = np.concatenate((self._scales, np.ones(entry, dtype=np.float32)))
            self._shifts = np.concatenate((self._shifts, np.zeros(entry, dtype=np.float32)))
        self._ids[entry] = token
        return entry


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


def late_inputs(step: ScheduledStep, vocab_size: int) -> tuple[LateInputs, list[tuple[Request, AnychipError]]]:
    """Masks and edits of the rows that have any, and the requests whose restrictions failed. Called when every
    earlier step's ids are known."""
    masks: dict[int, bytes] = {}
    edits: dict[int, LogitEdits] = {}
    failed: list[tuple[Request, AnychipError]] = []
    for position, (request, epoch) in enumerate(zip(step.sampling, step.epochs, strict=True)):
        if request.epoch != epoch:
            continue  # aborted or preempted since: nobody takes its token
        if request.editor is not None and (found := request.editor.edits(request)) is not None:
            edits[position] = found
        if request.processors:
            token_position = request.num_known
            active = [p for p in request.processors if p.applies(token_position)]
            if active:
                try:
                    masks[position] = _mask(request, token_position, active, vocab_size)
                except AnychipError as error:
                    failed.append((request, error))
    return LateInputs(step.decision.step_id, masks, edits), failed


def _mask(request: Request, position: int, active: Sequence[LogitsProcessor], vocab_size: int) -> bytes:
    """A restriction that would leave no token gives way to those before it. The first has none to give way to: raises
    InvalidRequest, since whatever were drawn would break it."""
    mask = _all_tokens(vocab_size)
    for number, processor in enumerate(active):
        before = mask.copy() if number else None
        processor.allowed(request, position, mask)
        if mask.any():
            continue
        if before is None:
            raise InvalidRequest(
                f"{processor.name} leaves none of the {vocab_size} tokens after {request.num_output} tokens of output"
            )
        mask = before
    return mask.tobytes()


def _all_tokens(vocab_size: int) -> np.ndarray:  # [ceil(vocab_size / 32)] uint32
    mask = np.full(cdiv(vocab_size, 32), _ALL, dtype=np.uint32)
    if vocab_size % 32:
        mask[-1] = (1 << vocab_size % 32) - 1
    return mask


def clear(mask: np.ndarray, ids: np.ndarray) -> None:
    """Forbids tokens in a mask."""
    np.bitwise_and.at(mask, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
