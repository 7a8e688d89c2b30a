"""Response bodies, built from engine outputs. Shapes: OpenAI's API reference."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.entrypoints.http.answer import sse
from anychip.entrypoints.http.errors import error_body
from anychip.entrypoints.http.long_json import LongList, listed
from anychip.entrypoints.turn import AnswerSoFar
from anychip.errors import AnychipError
from anychip.step_messages import TokenLogprobs
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

    def completion_choice(self, index: int, output: SequenceOutput, logprobs: Json | None) -> Json:
        return {
            "index": index,
            "text": output.text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            **self._extras(output),
        }

    async def completion_logprobs(
        self, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None], offsets: TextOffsets
    ) -> Json:
        """`found` None: a token that nothing stands before."""
        length = len(token_ids)
        return {
            "tokens": await listed((self._shown(token) for token in token_ids), length),
            "token_logprobs": await listed((None if entry is None else entry.chosen for entry in found), length),
            "top_logprobs": await listed(
                (None if entry is None else self._likeliest(entry) for entry in found), length
            ),
            "text_offset": await listed((offsets.take(token) for token in token_ids), length),
        }

    def _likeliest(self, entry: TokenLogprobs) -> dict[str, float]:
        likeliest: dict[str, float] = {}
        for token, value in zip(entry.top_ids, entry.top, strict=True):
            likeliest.setdefault(self._shown(token), value)  # of tokens with one text, the likeliest
        return likeliest

    def _shown(self, token_id: int) -> str:
        """A token in the form of completions, which has no field for bytes: OpenAI's own for parts of a character."""
        if self.tokenizer is None:
            return self.text(token_id)
        data = self.tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    async def prompt_logprobs(self, output: RequestOutput) -> list[Json | None] | LongList:
        """vLLM's form: by token of the prompt, its id and the likeliest ones to what is known of them."""
        scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs or [], strict=True)
        entries = chain([None], (self._prompt_entry(token, found) for token, found in scored))
        return await listed(entries, len(output.prompt_token_ids))

    def _prompt_entry(self, token: int, found: TokenLogprobs) -> Json:
        likeliest = zip(found.top_ids, found.top, strict=True)
        entry = {str(i): self._ranked(i, value, rank) for rank, (i, value) in enumerate(likeliest, start=1)}
        entry.setdefault(str(token), self._ranked(token, found.chosen, None))
        return entry

    def _ranked(self, token: int, logprob: float, rank: int | None) -> Json:
        text = self.text(token)
        entry: Json = {"logprob": logprob, "rank": rank, "decoded_token": text}
        if "\ufffd" in text:  # a part of a character, most likely
            entry["bytes"] = self._bytes(token)
        return entry

    # -- chat ---------------------------------------------------------------------------------------------

    def chat_choice(
        self,
        index: int,
        output: SequenceOutput,
        answer: AnswerSoFar,
        finish_reason: str | None,
        *,
        logprobs: Json | None,
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
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            **self._extras(output),
        }

    def chat_delta(
        self, index: int, delta: Json, output: SequenceOutput | None, finish_reason: str | None, logprobs: Json | None
    ) -> Json:
        """`output` and `logprobs` with the first of a piece's deltas, which carries its tokens."""
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            **({} if output is None else self._extras(output)),
        }

    async def chat_logprobs(self, output: SequenceOutput) -> Json | None:
        if output.logprobs is None:
            return None
        return {"content": await listed(self.chat_entries(output), len(output.logprobs)), "refusal": None}

    def chat_entries(self, output: SequenceOutput) -> Iterator[Json]:
        """Of an output that has log-probabilities, one for each of its tokens."""
        pairs = zip(output.token_ids, output.logprobs or [], strict=True)
        return (self._chat_entry(token, entry) for token, entry in pairs)

    def _chat_entry(self, token: int, entry: TokenLogprobs) -> Json:
        top = zip(entry.top_ids, entry.top, strict=True)
        return {
            **self._named(token, entry.chosen),
            "top_logprobs": [self._named(i, value) for i, value in top],
        }

    def _named(self, token: int, logprob: float) -> Json:
        return {"token": self.text(token), "logprob": logprob, "bytes": self._bytes(token)}

    # -- both ---------------------------------------------------------------------------------------------

    def text(self, token_id: int) -> str:
        """One token as text."""
        return self.tokenizer.token(token_id) if self.tokenizer is not None else f"token_id:{token_id}"

    def _bytes(self, token_id: int) -> list[int] | None:
        """What the token is made of: joined over tokens they are the text's, whatever characters they divide. None
        without a tokenizer."""
        return None if self.tokenizer is None else list(self.tokenizer.token_bytes(token_id))

    def _extras(self, output: SequenceOutput) -> Json:
        extras: Json = {} if output.stop_reason is None else {"stop_reason": output.stop_reason}
        if self.return_token_ids:
            extras["token_ids"] = output.token_ids
        return extras


class TextOffsets:
    """Where a choice's tokens begin in its text, in characters. A token that goes on with a character begins where the
    character does; one that the text leaves out has no length."""

    def __init__(self, tokenizer: Tokenizer | None, *, skip_special_tokens: bool) -> None:
        self._bytes = None
        if tokenizer is not None:
            self._bytes = tokenizer.shown_bytes if skip_special_tokens else tokenizer.all_bytes
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def take(self, token_id: int) -> int:
        """The next token's."""
        offset = self._offset
        if self._bytes is None:
            self._offset += len(f"token_id:{token_id}")
        else:
            self._offset += len(self._characters.decode(self._bytes[token_id]))
        return offset


def usage(outputs: Sequence[RequestOutput], num_generated: int) -> Json:
    """Token counts over a response's requests: `outputs` holds one of each."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": num_generated,
        "total_tokens": prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs)},
    }
