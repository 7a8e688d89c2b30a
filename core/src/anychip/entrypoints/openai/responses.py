"""Response bodies, built from engine outputs. Shapes: OpenAI's API reference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.entrypoints.http.answer import sse
from anychip.entrypoints.http.errors import error_body
from anychip.entrypoints.turn import AnswerSoFar
from anychip.errors import AnychipError
from anychip.messages import TokenLogprobs
from anychip.tokenizer.tokenizer import Tokenizer

Json = dict[str, Any]

STREAM_END = b"data: [DONE]\n\n"


def failed_stream(error: AnychipError) -> list[bytes]:
    """The end of a stream whose request failed on the way."""
    return [sse(error_body(str(error), kind="server_error", code=type(error).__name__)), STREAM_END]


class Reply:
    """Names and clock of one response; every piece of a stream carries the same."""

    def __init__(
        self, *, reply_id: str, kind: str, model: str, tokenizer: Tokenizer | None, return_token_ids: bool = False
    ) -> None:
        self.head = {"id": reply_id, "object": kind, "created": int(time.time()), "model": model}
        self.tokenizer = tokenizer
        self.return_token_ids = return_token_ids

    def whole(self, choices: Sequence[Json], usage: Json | None) -> Json:
        return {**self.head, "choices": list(choices), **({"usage": usage} if usage is not None else {})}

    # -- completions --------------------------------------------------------------------------------------

    def completion_choice(self, index: int, output: SequenceOutput, *, offset: int = 0) -> Json:
        """`offset`: characters of text before this piece, for logprobs.text_offset."""
        logprobs = None
        if output.logprobs is not None:
            logprobs = self.completion_logprobs(output.token_ids, output.logprobs, offset)
        return {
            "index": index,
            "text": output.text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            **self._extras(output),
        }

    def completion_logprobs(self, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None], offset: int) -> Json:
        """`found` None: a token that nothing stands before."""
        tokens = [self.text(token) for token in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else entry.chosen for entry in found],
            "top_logprobs": [None if entry is None else self._likeliest(entry) for entry in found],
            "text_offset": offsets,
        }

    def _likeliest(self, entry: TokenLogprobs) -> dict[str, float]:
        return {self.text(i): value for i, value in zip(entry.top_ids, entry.top, strict=True)}

    def prompt_logprobs(self, output: RequestOutput) -> list[Json | None]:
        """vLLM's form: by token of the prompt, its id and the likeliest ones to what is known of them."""
        entries: list[Json | None] = [None]
        for token, found in zip(output.prompt_token_ids[1:], output.prompt_logprobs or [], strict=True):
            likeliest = zip(found.top_ids, found.top, strict=True)
            listed = {
                str(i): {"logprob": value, "rank": rank, "decoded_token": self.text(i)}
                for rank, (i, value) in enumerate(likeliest, start=1)
            }
            listed.setdefault(str(token), {"logprob": found.chosen, "rank": None, "decoded_token": self.text(token)})
            entries.append(listed)
        return entries

    # -- chat ---------------------------------------------------------------------------------------------

    def chat_choice(
        self,
        index: int,
        output: SequenceOutput,
        answer: AnswerSoFar,
        finish_reason: str | None,
        *,
        with_reasoning: bool = True,
    ) -> Json:
        message: Json = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning and with_reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self.chat_logprobs(output),
            "finish_reason": finish_reason,
            **self._extras(output),
        }

    def chat_delta(self, index: int, delta: Json, output: SequenceOutput | None, finish_reason: str | None) -> Json:
        """`output` with the first of a piece's deltas, which carries its tokens."""
        return {
            "index": index,
            "delta": delta,
            "logprobs": None if output is None else self.chat_logprobs(output),
            "finish_reason": finish_reason,
            **({} if output is None else self._extras(output)),
        }

    def chat_logprobs(self, output: SequenceOutput) -> Json | None:
        if output.logprobs is None:
            return None
        pairs = zip(output.token_ids, output.logprobs, strict=True)
        return {"content": [self._chat_entry(token, entry) for token, entry in pairs], "refusal": None}

    def _chat_entry(self, token: int, entry: TokenLogprobs) -> Json:
        top = zip(entry.top_ids, entry.top, strict=True)
        return {
            **self._named(token, entry.chosen),
            "top_logprobs": [self._named(i, value) for i, value in top],
        }

    def _named(self, token: int, logprob: float) -> Json:
        text = self.text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    # -- both ---------------------------------------------------------------------------------------------

    def text(self, token_id: int) -> str:
        """One token as text."""
        return self.tokenizer.token(token_id) if self.tokenizer is not None else f"token_id:{token_id}"

    def _extras(self, output: SequenceOutput) -> Json:
        extras: Json = {} if output.stop_reason is None else {"stop_reason": output.stop_reason}
        if self.return_token_ids:
            extras["token_ids"] = output.token_ids
        return extras


def usage(outputs: Sequence[RequestOutput], num_generated: int) -> Json:
    """Token counts over a response's requests: `outputs` holds one of each."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": num_generated,
        "total_tokens": prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs)},
    }
