"""Turns new tokens into text, ends sequences at stop strings, and keeps each request until its last sequence ends."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from anychip.engine.outputs import Pieces, RequestOutput, SequenceOutput
from anychip.engine.stop_strings import StopStrings
from anychip.errors import AnychipError, OutputFailed, rebuild
from anychip.messages import Abort, AddRequest, SequenceDelta
from anychip.tokenizer.detokenizer import Detokenizer
from anychip.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("anychip.engine")


class _Sequence:
    """What is known of one sequence while it runs: its text is not kept, but for an end that a stop string may need."""

    def __init__(self, request: AddRequest, tokenizer: Tokenizer | None) -> None:
        sampling = request.sampling
        self.detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self.detokenizer = Detokenizer(
                tokenizer, request.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
            )
        self.keeps_stops = sampling.include_stop_str_in_output
        self.stops = StopStrings(sampling.stop, include_stop=self.keeps_stops) if sampling.stop else None
        self.stop_token_ids = frozenset(sampling.stop_token_ids)
        self.min_tokens = sampling.min_tokens
        self.num_tokens = 0
        self.done = False

    def add(self, delta: SequenceDelta) -> SequenceOutput:
        output = SequenceOutput(
            index=delta.index,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            finish_reason=delta.finish_reason,
        )
        stopped = delta.finish_reason == "stop" and bool(delta.token_ids)
        if stopped and delta.token_ids[-1] in self.stop_token_ids:
            output.stop_reason = delta.token_ids[-1]
        if self.detokenizer is not None:
            hides_last = stopped and not (self.keeps_stops and output.stop_reason is not None)
            visible = delta.token_ids[:-1] if hides_last else delta.token_ids
            if self.stops is None:
                output.text = self.detokenizer.add(visible)
                if delta.finish_reason is not None:
                    output.text += self.detokenizer.rest()
            else:
                output.text = self._text_until_stop(output, visible, self.detokenizer, self.stops)
        self.num_tokens += len(output.token_ids)
        self.done = output.finish_reason is not None
        return output

    def _text_until_stop(
        self, output: SequenceOutput, visible: list[int], detokenizer: Detokenizer, stops: StopStrings
    ) -> str:
        """Token by token, so that the answer does not depend on how many come at once. A stop string ends the output
        with the token that completed it."""
        texts = []
        for number, token in enumerate(visible, start=1):
            may_stop = self.num_tokens + number >= self.min_tokens
            texts.append(stops.add(detokenizer.add((token,)), may_stop=may_stop))
            if stops.found is not None:
                output.token_ids = output.token_ids[:number]
                output.logprobs = None if output.logprobs is None else output.logprobs[:number]
                break
        else:
            if output.finish_reason is not None:
                may_stop = self.num_tokens + len(output.token_ids) >= self.min_tokens
                texts.append(stops.add(detokenizer.rest(), may_stop=may_stop))
                texts.append(stops.rest())
        if stops.found is not None:
            output.finish_reason, output.stop_reason = "stop", stops.found
        return "".join(texts)


class _Request:
    def __init__(self, message: AddRequest, tokenizer: Tokenizer | None) -> None:
        self.prompt_token_ids = message.prompt_token_ids.tolist()
        self.sequences = [_Sequence(message, tokenizer) for _ in range(message.sampling.n)]
        self.num_open = len(self.sequences)
        self.cached_tokens = 0


class OutputProcessor:
    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}

    def add(self, message: AddRequest) -> None:
        self._requests[message.request_id] = _Request(message, self.tokenizer)

    def drop(self, request_id: str) -> None:
        """Forgets a request, which may be forgotten already."""
        self._requests.pop(request_id, None)

    def process(self, delta: SequenceDelta) -> tuple[RequestOutput | None, bool]:
        """The caller's view of a delta, and whether the engine must be told that the sequence has ended: a stop
        string ended it here. None for a request or sequence that is already over."""
        request = self._requests.get(delta.request_id)
        if request is None or request.sequences[delta.index].done:
            return None, False
        if not delta.index:
            request.cached_tokens = max(request.cached_tokens, delta.cached_tokens)
        output = request.sequences[delta.index].add(delta)
        if output.finish_reason is not None:
            request.num_open -= 1
        finished = not request.num_open
        if finished:
            del self._requests[delta.request_id]
        return RequestOutput(
            request_id=delta.request_id,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[output],
            cached_tokens=request.cached_tokens,
            prompt_logprobs=delta.prompt_logprobs,
            queued_s=delta.queued_s,
            finished=finished,
            vector=delta.vector,
        ), output.finish_reason is not None and delta.finish_reason is None


@dataclass(frozen=True, slots=True)
class Received:
    """What a delta brought: an output or the request's error, which ends it; and what the engine must be told."""

    item: RequestOutput | AnychipError | None = None
    abort: Abort | None = None


def receive(outputs: OutputProcessor, delta: SequenceDelta) -> Received:
    """Whatever goes wrong with a delta is an error of its own request alone."""
    request_id = delta.request_id
    if delta.error is not None:
        outputs.drop(request_id)
        return Received(rebuild(*delta.error))
    try:
        output, ended_here = outputs.process(delta)
    except Exception as error:  # a tokenizer, or a bug of ours: no reason to end anybody else's request
        log.exception("request %s is ended: its output could not be made", request_id)
        outputs.drop(request_id)
        failure = OutputFailed(f"the answer could not be made of its tokens: {type(error).__name__}: {error}")
        return Received(failure, Abort(request_id))
    return Received(output, Abort(request_id, delta.index, "stop") if ended_here else None)


def merge(outputs: list[RequestOutput]) -> RequestOutput:
    """One final output of all the pieces, one or more, that a request produced. The pieces stay as they are."""
    pieces = Pieces()
    for output in outputs:
        pieces.add(output)
    whole = pieces.take()
    assert whole is not None, "a request has one piece at least"
    return whole
