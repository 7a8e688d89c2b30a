"""What clients are told of a request when a step's result is in."""

from __future__ import annotations

from anychip.messages import SequenceDelta
from anychip.request import Request
from anychip.types import FinishReason


def delta_of(request: Request, told: list[int], reason: FinishReason | None) -> SequenceDelta:
    """The newest of a request's tokens, for the clients; with its first, what was to be known of its beginning."""
    delta = SequenceDelta(request.request_id, request.index, told, finish_reason=reason)
    if len(told) == len(request.output_token_ids):
        delta.cached_tokens = request.cached_tokens
        delta.queued_s = request.scheduled_at - request.arrived_at
        if request.sampling.prompt_logprobs is not None and not request.index:
            delta.prompt_logprobs = request.prompt_logprobs
    return delta


def until_end(request: Request, tokens: list[int]) -> list[int]:
    """Of the tokens that follow a request's output, those up to its end."""
    before = request.num_output
    for count in range(1, len(tokens) + 1):
        stops = tokens[count - 1] in request.stop_ids and before + count >= request.sampling.min_tokens
        if stops or before + count >= request.max_output:
            return tokens[:count]
    return tokens
