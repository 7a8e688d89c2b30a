"""What a caller receives: text and tokens of a request's sequences, in pieces or whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from anychip.step_messages import TokenLogprobs
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
    """`request_id` is the caller's. `finished` once every sequence has ended. `cached_tokens` of the prompt came from
    the prefix cache."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[SequenceOutput]
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt's tokens from the second on, with the first output."""
    queued_s: float | None = None
    """With the first output: how long the request waited in the engine."""
    finished: bool = False
    vector: bytes | None = None
    """float32 [hidden_size], of a request for one; its one output has no tokens."""


class Pieces:
    """Outputs of one request that nobody has taken yet, as one. However many come, an output costs little more than its
    text and ids: a slow reader does not hold thousands of small objects."""

    __slots__ = ("_newest", "_prompt_logprobs", "_queued_s", "_sequences")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._newest: RequestOutput | None = None
        self._queued_s: float | None = None
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self._sequences: dict[int, _Parts] = {}

    def add(self, output: RequestOutput) -> None:
        if self._newest is not None and not self._sequences:
            self._keep(self._newest)  # a lone output is given on as it is
        if self._newest is not None:
            self._keep(output)
        self._newest = output

    def take(self) -> RequestOutput | None:
        """All that was added since the last time; None: nothing."""
        newest = self._newest
        if newest is not None and self._sequences:
            newest = RequestOutput(
                request_id=newest.request_id,
                prompt_token_ids=newest.prompt_token_ids,
                outputs=[self._sequences[index].joined() for index in sorted(self._sequences)],
                cached_tokens=newest.cached_tokens,
                prompt_logprobs=self._prompt_logprobs,
                queued_s=self._queued_s,
                finished=newest.finished,
            )
        self._clear()
        return newest

    def _keep(self, output: RequestOutput) -> None:
        if self._queued_s is None:
            self._queued_s = output.queued_s
        if self._prompt_logprobs is None:
            self._prompt_logprobs = output.prompt_logprobs
        for piece in output.outputs:
            parts = self._sequences.get(piece.index)
            if parts is None:
                parts = self._sequences[piece.index] = _Parts(piece.index)
            parts.add(piece)


class _Parts:
    """Of one sequence. Text is joined once, so that its length does not matter to a piece's cost."""

    __slots__ = ("_texts", "_whole")

    def __init__(self, index: int) -> None:
        self._whole = SequenceOutput(index=index)
        self._texts: list[str] = []

    def add(self, piece: SequenceOutput) -> None:
        whole = self._whole
        if piece.text:
            self._texts.append(piece.text)
        whole.token_ids.extend(piece.token_ids)
        if piece.logprobs is not None:
            if whole.logprobs is None:
                whole.logprobs = []
            whole.logprobs.extend(piece.logprobs)
        whole.finish_reason = piece.finish_reason or whole.finish_reason
        if piece.stop_reason is not None:
            whole.stop_reason = piece.stop_reason

    def joined(self) -> SequenceOutput:
        self._whole.text = "".join(self._texts)
        return self._whole
