"""Turns new tokens into text, finds stop strings, and keeps each request until its last sequence ends."""

from __future__ import annotations

from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.messages import AddRequest, SequenceDelta
from anychip.tokenizer.detokenizer import Detokenizer
from anychip.tokenizer.tokenizer import Tokenizer


class _Sequence:
    """Text of one sequence. While stop strings may be forming, the text's end is held back."""

    def __init__(self, request: AddRequest, tokenizer: Tokenizer | None) -> None:
        sampling = request.sampling
        self.detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self.detokenizer = Detokenizer(
                tokenizer, request.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
            )
        self.stops = sampling.stop
        self.keeps_stops = sampling.include_stop_str_in_output
        self.stop_token_ids = frozenset(sampling.stop_token_ids)
        self.min_tokens = sampling.min_tokens
        self.longest_stop = max(map(len, self.stops), default=0)
        self.text = ""
        self.sent = 0
        self.num_tokens = 0
        self.done = False

    def add(self, delta: SequenceDelta) -> SequenceOutput:
        output = SequenceOutput(
            index=delta.index,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            finish_reason=delta.finish_reason,
        )
        self.num_tokens += len(delta.token_ids)
        if delta.finish_reason == "stop" and delta.token_ids[-1] in self.stop_token_ids:
            output.stop_reason = delta.token_ids[-1]
        if self.detokenizer is not None:
            hides_last = delta.finish_reason == "stop" and not (self.keeps_stops and output.stop_reason is not None)
            visible = delta.token_ids[:-1] if hides_last else delta.token_ids
            searched_from = max(0, len(self.text) - self.longest_stop + 1)
            self.text += self.detokenizer.add(visible)
            if delta.finish_reason is not None:
                self.text += self.detokenizer.rest()
            self._find_stop(output, searched_from)
            held = 0 if output.finish_reason else max(0, self.longest_stop - 1)
            end = max(self.sent, len(self.text) - held)
            output.text, self.sent = self.text[self.sent : end], end
        self.done = output.finish_reason is not None
        return output

    def _find_stop(self, output: SequenceOutput, searched_from: int) -> None:
        """Cuts the text before the stop string that ends first."""
        if not self.stops or self.num_tokens < self.min_tokens:
            return
        found = [(self.text.find(stop, searched_from), stop) for stop in self.stops]
        found = [(at, stop) for at, stop in found if at >= 0]
        if found:
            at, stop = min(found, key=lambda hit: hit[0] + len(hit[1]))
            self.text = self.text[: at + len(stop) if self.keeps_stops else at]
            output.finish_reason, output.stop_reason = "stop", stop


class _Request:
    def __init__(self, message: AddRequest, tokenizer: Tokenizer | None) -> None:
        self.prompt_token_ids = message.prompt_token_ids.tolist()
        self.sequences = [_Sequence(message, tokenizer) for _ in range(message.sampling.n)]
        self.cached_tokens = 0


class OutputProcessor:
    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}

    def add(self, message: AddRequest) -> None:
        self._requests[message.request_id] = _Request(message, self.tokenizer)

    def drop(self, request_id: str) -> None:
        """Forgets a request whose caller is gone."""
        self._requests.pop(request_id, None)

    def process(self, delta: SequenceDelta) -> tuple[RequestOutput | None, bool]:
        """The caller's view of a delta, and whether the engine must be told that the sequence has ended: a stop
        string ended it here. None for a request or sequence that is already over."""
        request = self._requests.get(delta.request_id)
        if request is None or request.sequences[delta.index].done:
            return None, False
        request.cached_tokens = (
            request.cached_tokens if delta.index else max(request.cached_tokens, delta.cached_tokens)
        )
        output = request.sequences[delta.index].add(delta)
        finished = all(sequence.done for sequence in request.sequences)
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
        ), output.finish_reason is not None and delta.finish_reason is None


def merge(outputs: list[RequestOutput]) -> RequestOutput:
    """One final output of all the pieces that a request produced."""
    last = outputs[-1]
    sequences: dict[int, SequenceOutput] = {}
    for output in outputs:
        for piece in output.outputs:
            whole = sequences.setdefault(piece.index, SequenceOutput(index=piece.index))
            whole.text += piece.text
            whole.token_ids += piece.token_ids
            if piece.logprobs is not None:
                whole.logprobs = (whole.logprobs or []) + piece.logprobs
            whole.finish_reason = piece.finish_reason or whole.finish_reason
            whole.stop_reason = piece.stop_reason or whole.stop_reason
    return RequestOutput(
        request_id=last.request_id,
        prompt_token_ids=last.prompt_token_ids,
        outputs=[sequences[index] for index in sorted(sequences)],
        cached_tokens=last.cached_tokens,
        queued_s=next((o.queued_s for o in outputs if o.queued_s is not None), None),
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
        finished=last.finished,
    )
