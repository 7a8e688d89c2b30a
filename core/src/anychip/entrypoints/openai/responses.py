"""Response bodies, built from engine outputs. Shapes: OpenAI's API reference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.messages import TokenLogprobs
from anychip.tokenizer.tokenizer import Tokenizer


class Reply:
    """Names and clock of one response; every piece of a stream carries the same."""

    def __init__(self, *, reply_id: str, kind: str, model: str, tokenizer: Tokenizer | None) -> None:
        self.head = {"id": reply_id, "object": kind, "created": int(time.time()), "model": model}
        self.tokenizer = tokenizer

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {**self.head, "choices": list(choices), **({"usage": usage} if usage is not None else {})}

    def completion_choice(self, index: int, output: SequenceOutput) -> dict[str, Any]:
        return {
            "index": index,
            "text": output.text,
            "logprobs": None if output.logprobs is None else self._completion_logprobs(output),
            "finish_reason": output.finish_reason,
            **_stop_reason(output),
        }

    def chat_choice(self, index: int, output: SequenceOutput) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text},
            "logprobs": None if output.logprobs is None else self._chat_logprobs(output),
            "finish_reason": output.finish_reason,
            **_stop_reason(output),
        }

    def chat_delta(self, index: int, output: SequenceOutput, *, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        return {
            "index": index,
            "delta": {**delta, "content": output.text},
            "logprobs": None if output.logprobs is None else self._chat_logprobs(output),
            "finish_reason": output.finish_reason,
            **_stop_reason(output),
        }

    def _text(self, token_id: int) -> str:
        return self.tokenizer.token(token_id) if self.tokenizer is not None else f"token_id:{token_id}"

    def _completion_logprobs(self, output: SequenceOutput) -> dict[str, Any]:
        found = output.logprobs or []
        tokens = [self._text(token) for token in output.token_ids]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.chosen for entry in found],
            "top_logprobs": [
                {self._text(i): value for i, value in zip(entry.top_ids, entry.top, strict=True)} for entry in found
            ],
            "text_offset": [],
        }

    def _chat_logprobs(self, output: SequenceOutput) -> dict[str, Any]:
        pairs = zip(output.token_ids, output.logprobs or [], strict=True)
        return {"content": [self._chat_entry(token, entry) for token, entry in pairs]}

    def _chat_entry(self, token: int, entry: TokenLogprobs) -> dict[str, Any]:
        top = zip(entry.top_ids, entry.top, strict=True)
        return {
            **self._named(token, entry.chosen),
            "top_logprobs": [self._named(i, value) for i, value in top],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(outputs: Sequence[RequestOutput], num_generated: int) -> dict[str, Any]:
    """Token counts over a response's requests: `outputs` holds one of each."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": num_generated,
        "total_tokens": prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs)},
    }


def error_body(message: str, *, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _stop_reason(output: SequenceOutput) -> dict[str, Any]:
    return {} if output.stop_reason is None else {"stop_reason": output.stop_reason}
