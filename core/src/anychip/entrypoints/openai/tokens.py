"""POST /tokenize and /detokenize: texts and conversations to ids, and back. Shapes: vLLM's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import Field

from anychip.entrypoints.http.body import Several, Strict
from anychip.entrypoints.http.long_json import listed
from anychip.entrypoints.openai.chat_protocol import MAX_MESSAGES, ChatMessage, ToolBody
from anychip.entrypoints.openai.protocol import TokenIds
from anychip.entrypoints.serving import Serving
from anychip.entrypoints.turn import TurnRequest, render
from anychip.errors import InvalidRequest
from anychip.sampling_params import SamplingParams
from anychip.tokenizer.tokenizer import Tokenizer


class TokenizeBody(Strict):
    """A prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, max_length=MAX_MESSAGES, fail_fast=True)
    tools: Several[ToolBody] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: TokenIds


async def tokenize(serving: Serving, body: TokenizeBody) -> dict[str, Any]:
    """Raises InvalidRequest."""
    llm = serving.llm
    serving.check_model(body.model)
    if llm.tokenizer is None:
        raise InvalidRequest("the tokenizer is off")
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give prompt or messages", param="prompt")
    text, adds_special = body.prompt, body.add_special_tokens is not False
    if text is None:
        turn = TurnRequest(
            messages=[message.for_template() for message in body.messages or ()],
            sampling=SamplingParams(),
            tools=[tool.tool() for tool in body.tools or ()],
            add_generation_prompt=body.add_generation_prompt,
        )
        text, adds_special = await render(llm, turn), bool(body.add_special_tokens)
    ids = await llm.threads.run(len(text), partial(llm.tokenizer.encode, text, add_special_tokens=adds_special))
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": llm.max_model_len}
    answer["tokens"] = await listed(ids, len(ids))
    if body.return_token_strs:
        answer["token_strs"] = await listed(map(llm.tokenizer.token, ids), len(ids))
    return answer


async def detokenize(serving: Serving, body: DetokenizeBody) -> dict[str, Any]:
    """Raises InvalidRequest for an id outside the vocabulary."""
    llm = serving.llm
    serving.check_model(body.model)
    if llm.tokenizer is None:
        raise InvalidRequest("the tokenizer is off")
    return {"prompt": await asyncio.to_thread(_text, llm.tokenizer, body.tokens, llm.model.vocab_size)}


def _text(tokenizer: Tokenizer, tokens: Sequence[int], vocab_size: int) -> str:
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        shown = bad if abs(bad) < 2**64 else "an id beyond 64 bits"
        raise InvalidRequest(f"tokens holds {shown}; the vocabulary has {vocab_size}", param="tokens")
    return tokenizer.decode(tokens, skip_special_tokens=False)
