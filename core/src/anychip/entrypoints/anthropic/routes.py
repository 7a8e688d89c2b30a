"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from anychip.chat.events import Content, Event, Reasoning, ToolArguments, ToolStart
from anychip.engine.outputs import RequestOutput
from anychip.entrypoints.anthropic.protocol import (
    ConversationBody,
    CountTokensBody,
    MessagesBody,
    parsed_arguments,
)
from anychip.entrypoints.http.answer import respond, sse
from anychip.entrypoints.http.body import read_body, schema_of
from anychip.entrypoints.serving import Caller, Serving
from anychip.entrypoints.turn import Turn, TurnRequest, render
from anychip.errors import AnychipError
from anychip.sampling_params import SamplingParams

Json = dict[str, Any]
BODIES = (MessagesBody, CountTokensBody)


@dataclass(slots=True, kw_only=True)
class MessageAnswer:
    """http.answer.Answer of one message. One content block is open at a time."""

    turn: Turn
    model: str
    message_id: str
    blocks: list[Json] = field(default_factory=list)
    is_open: bool = False

    async def whole(self) -> Json:
        final: Json = {}
        async with aclosing(self.items()) as items:
            async for item in items:
                if item["type"] == "message_delta":
                    final = item
        for block in self.blocks:
            if block["type"] == "tool_use":
                block["input"] = parsed_arguments(block.pop("json"))
        return {
            **self._head(),
            "content": self.blocks,
            **final["delta"],
            "usage": final["usage"],
        }

    async def events(self) -> AsyncGenerator[bytes]:
        async with aclosing(self.items()) as items:
            async for item in items:
                yield sse(item, item["type"])

    def failure(self, error: AnychipError) -> list[bytes]:
        return [sse({"type": "error", "error": {"type": "api_error", "message": str(error)}}, "error")]

    async def items(self) -> AsyncGenerator[Json]:
        """The stream's events."""
        last: RequestOutput | None = None
        num_output, reason, stop = 0, None, None
        async with aclosing(self.turn.pieces()) as pieces:
            async for piece in pieces:
                if last is None:
                    head = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
                    yield {"type": "message_start", "message": {**head, "usage": _usage(piece.request, 0)}}
                last, reason, stop = piece.request, piece.finish_reason, piece.output.stop_reason
                num_output += len(piece.output.token_ids)
                for event in piece.events:
                    for item in self._take(event):
                        yield item
        for item in self._close():
            yield item
        assert last is not None
        sequence = stop if isinstance(stop, str) else None
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": _stop_reason(reason, sequence), "stop_sequence": sequence},
            "usage": _usage(last, num_output),
        }
        yield {"type": "message_stop"}

    def _take(self, event: Event) -> Iterator[Json]:
        match event:
            case Content(text):
                yield from self._open({"type": "text", "text": ""})
                yield self._delta("text", {"type": "text_delta", "text": text})
            case Reasoning(text):
                yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta("thinking", {"type": "thinking_delta", "thinking": text})
            case ToolStart(_, call_id, name):
                yield from self._close()
                yield from self._open({"type": "tool_use", "id": f"toolu_{call_id}", "name": name, "input": {}})
                self.blocks[-1]["json"] = ""
            case ToolArguments(_, text):
                yield self._delta("json", {"type": "input_json_delta", "partial_json": text})

    def _open(self, block: Json) -> Iterator[Json]:
        if self.is_open and self.blocks[-1]["type"] == block["type"]:
            return
        yield from self._close()
        self.blocks.append(block)
        self.is_open = True
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, name: str, delta: Json) -> Json:
        self.blocks[-1][name] += delta["partial_json" if name == "json" else name]
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if self.is_open:
            self.is_open = False
            yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _head(self) -> Json:
        return {"id": self.message_id, "type": "message", "role": "assistant", "model": self.model}


def anthropic_routes(serving: Serving) -> APIRouter:
    router, lenient = APIRouter(), serving.config.lenient

    @router.post("/v1/messages", openapi_extra=schema_of(MessagesBody))
    async def messages(request: Request) -> Response:
        body = await read_body(request, MessagesBody, lenient=lenient)
        return await respond(await accept_message(serving, body, Caller.of(request)), request, stream=body.stream)

    @router.post("/v1/messages/count_tokens", openapi_extra=schema_of(CountTokensBody))
    async def count_tokens(request: Request) -> Response:
        body = await read_body(request, CountTokensBody, lenient=lenient)
        serving.check_model(body.model)
        serving.check_draws()
        turn = _turn(body, SamplingParams())
        text = await render(serving.llm, turn)
        assert serving.llm.tokenizer is not None
        encoded = partial(serving.llm.tokenizer.encode, text, add_special_tokens=False)
        ids = await serving.llm.threads.run(len(text), encoded)
        return JSONResponse({"input_tokens": len(ids)})

    return router


async def accept_message(serving: Serving, body: MessagesBody, caller: Caller) -> MessageAnswer:
    """Checks everything before anything runs. Raises UserError."""
    asked = serving.check_model(body.model)
    serving.check_draws()
    message_id = f"msg_{uuid.uuid4().hex}"
    turn = _turn(
        body, body.sampling(serving.llm.sampling_defaults), serving.options(caller, None, adapter=asked.adapter)
    )
    accepted = await Turn.accept(serving.llm, serving.parsers, message_id, turn)
    return MessageAnswer(turn=accepted, model=asked.name, message_id=message_id)


def _turn(body: ConversationBody, sampling: SamplingParams, *options: Any) -> TurnRequest:
    messages, prefill = body.conversation()
    thinking = body.thinking or {}
    return TurnRequest(
        messages=messages,
        prefill=prefill,
        sampling=sampling,
        tools=[tool.tool() for tool in body.tools or ()],
        tool_choice=body.choice(),
        template_variables={"enable_thinking": False} if thinking.get("type") == "disabled" else {},
        **({"options": options[0]} if options else {}),
    )


def _usage(output: RequestOutput, num_output: int) -> Json:
    cached = output.cached_tokens
    return {
        "input_tokens": len(output.prompt_token_ids) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": num_output,
    }


def _stop_reason(reason: str | None, sequence: str | None) -> str:
    if sequence is not None:
        return "stop_sequence"
    return {"length": "max_tokens", "tool_calls": "tool_use"}.get(reason or "", "end_turn")
