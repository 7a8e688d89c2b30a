"""Restrictions on the next token, and how they become the masks that a step's sampling takes."""

from __future__ import annotations

import numpy as np

from anychip.messages import LateInputs
from anychip.request import LogitsProcessor, Request
from anychip.sampling_params import SamplingParams
from anychip.scheduler.scheduler import ScheduledStep


class MinTokens:
    """Forbids the tokens that would end a sequence before it has `min_tokens` of output."""

    def __init__(self, *, num_prompt: int, min_tokens: int, stop_ids: frozenset[int]) -> None:
        self.until = num_prompt + min_tokens
        self.stop_ids = np.fromiter(stop_ids, dtype=np.int64)

    def applies(self, position: int) -> bool:
        return position < self.until

    def allowed(self, request: Request, position: int, mask: np.ndarray) -> None:
        np.bitwise_and.at(mask, self.stop_ids // 32, ~(np.uint32(1) << (self.stop_ids % 32).astype(np.uint32)))


def make_processors(
    sampling: SamplingParams, *, num_prompt: int, stop_ids: frozenset[int]
) -> tuple[LogitsProcessor, ...]:
    """What a request's parameters ask for; () for most."""
    if sampling.min_tokens > 0 and stop_ids:
        return (MinTokens(num_prompt=num_prompt, min_tokens=sampling.min_tokens, stop_ids=stop_ids),)
    return ()


def late_inputs(step: ScheduledStep, vocab_size: int) -> LateInputs:
    """Masks for the rows that have processors. Called when every earlier step's ids are known."""
    masks: dict[int, bytes] = {}
    for position, request in enumerate(step.sampling):
        if request.processors:
            token_position = request.num_computed
            active = [p for p in request.processors if p.applies(token_position)]
            if active:
                mask = np.full(-(-vocab_size // 32), 0xFFFFFFFF, dtype=np.uint32)
                for processor in active:
                    processor.allowed(request, token_position, mask)
                masks[position] = mask.tobytes()
    return LateInputs(step.decision.step_id, masks)
