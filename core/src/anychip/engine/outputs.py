"""What a caller receives: text and tokens of a request's sequences, in pieces or whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from anychip.messages import TokenLogprobs
from anychip.types import FinishReason


@dataclass(slots=True, kw_only=True)
class SequenceOutput:
    """One of a request's n sequences: new text and tokens, or all of them in a final output."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string, or the one of the request's stop tokens, that ended the sequence."""


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """`finished` once every sequence has ended. `cached_tokens` of the prompt came from the prefix cache."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[SequenceOutput]
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt's tokens from the second on, with the first output."""
    queued_s: float | None = None
    """With the first output: how long the request waited in the engine."""
    finished: bool = False
