"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from anychip.chat.events import Content, Event, Reasoning, ToolArguments, ToolStart
from anychip.engine.output_processor import merge
from anychip.engine.outputs import RequestOutput
from anychip.entrypoints.http.answer import long_sse, sse
from anychip.entrypoints.openai.chat_protocol import ChatBody
from anychip.entrypoints.openai.responses import STREAM_END, Json, Reply, failed_stream, usage
from anychip.entrypoints.serving import Caller, Serving
from anychip.entrypoints.turn import Piece, Turn, TurnRequest
from anychip.errors import AnychipError, InvalidRequest


@dataclass(slots=True, kw_only=True)
class ChatAnswer:
    """http.answer.Answer of one turn."""

    body: ChatBody
    reply: Reply
    turn: Turn
    begun: set[int] = field(default_factory=set)

    async def whole(self) -> Json:
        outputs: list[RequestOutput] = []
        reasons: dict[int, str | None] = {}
        async with aclosing(self.turn.pieces()) as pieces:
            async for piece in pieces:
                reasons[piece.index] = piece.finish_reason
                if not outputs or outputs[-1] is not piece.request:
                    outputs.append(piece.request)
        final = merge(outputs)
        choices = []
        for output in final.outputs:
            choice = self.reply.chat_choice(
                output.index, output, self.turn.answer(output.index), reasons[output.index],
                logprobs=await self.reply.chat_logprobs(output), with_reasoning=self.body.include_reasoning,
            )  # fmt: skip
            choices.append(choice)
        whole = self.reply.whole(choices, usage([final], sum(len(output.token_ids) for output in final.outputs)))
        if self.body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = await self.reply.prompt_logprobs(final)
        if self.body.return_token_ids:
            whole["prompt_token_ids"] = final.prompt_token_ids
        return whole

    async def events(self) -> AsyncGenerator[bytes]:
        generated = 0
        last: RequestOutput | None = None
        async with aclosing(self.turn.pieces()) as pieces:
            async for piece in pieces:
                last = piece.request
                generated += len(piece.output.token_ids)
                usages = usage([last], generated) if self.body.continuous_usage else None
                logprobs = await self.reply.chat_logprobs(piece.output)
                for choice in self._choices(piece, logprobs):
                    for part in long_sse(self.reply.whole([choice], usages)):
                        yield part
        if self.body.include_usage and last is not None:
            yield sse(self.reply.whole([], usage([last], generated)))
        yield STREAM_END

    def failure(self, error: AnychipError) -> list[bytes]:
        return failed_stream(error)

    def _choices(self, piece: Piece, logprobs: Json | None) -> Iterator[Json]:
        """The chunks of a piece: one an event; its tokens go with the first, its end with the last."""
        deltas = [delta for event in piece.events if (delta := self._delta(event)) is not None]
        if piece.index not in self.begun:
            self.begun.add(piece.index)
            deltas[:1] = [{"role": "assistant", "content": "", **(deltas[0] if deltas else {})}]
        tells = piece.finish_reason is not None or piece.output.logprobs or self.body.return_token_ids
        if not deltas and tells:
            deltas = [{"content": ""}]
        for number, delta in enumerate(deltas):
            ends = piece.finish_reason if number == len(deltas) - 1 else None
            first = number == 0
            yield self.reply.chat_delta(
                piece.index, delta, piece.output if first else None, ends, logprobs if first else None
            )

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text} if self.body.include_reasoning else None
            case ToolStart(index, call_id, name):
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
            case ToolArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


async def accept_chat(serving: Serving, body: ChatBody, caller: Caller) -> ChatAnswer:
    """Checks everything before anything runs. Raises UserError."""
    asked = serving.check_model(body.model)
    serving.check_draws()
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    messages, prefill = body.conversation()
    turn_request = TurnRequest(
        messages=messages,
        prefill=prefill,
        sampling=body.sampling(
            serving.llm.sampling_defaults,
            max_tokens=body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ),
        tools=[tool.tool() for tool in body.tools or ()],
        tool_choice=body.choice(),
        options=serving.options(
            caller,
            body.deadline,
            priority=body.priority,
            cache_salt=body.cache_salt,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            adapter=asked.adapter,
        ),
        add_generation_prompt=body.add_generation_prompt or body.continue_final_message,
        template_variables=body.template_variables(),
    )
    reply_id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
    return ChatAnswer(
        body=body,
        reply=Reply(
            reply_id=reply_id,
            kind="chat.completion.chunk" if body.stream else "chat.completion",
            model=asked.name,
            tokenizer=serving.llm.tokenizer,
            return_token_ids=body.return_token_ids,
        ),
        turn=await Turn.accept(serving.llm, serving.parsers, reply_id, turn_request),
    )
