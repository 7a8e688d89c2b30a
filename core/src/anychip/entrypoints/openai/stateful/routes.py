"""/v1/responses: create, continue, ask for again, delete."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from anychip.entrypoints.http.answer import long_sse, respond
from anychip.entrypoints.http.body import read_body, schema_of
from anychip.entrypoints.http.long_json import GrowingList, JsonResponse
from anychip.entrypoints.openai.responses import Reply
from anychip.entrypoints.openai.stateful.builder import ResponseBuilder
from anychip.entrypoints.openai.stateful.protocol import Message, ResponsesBody
from anychip.entrypoints.openai.stateful.store import ResponseStore, Stored
from anychip.entrypoints.serving import Caller, Serving
from anychip.entrypoints.turn import Turn, TurnRequest
from anychip.errors import AnychipError, InvalidRequest, UnknownResponse


@dataclass(slots=True, kw_only=True)
class ResponseAnswer:
    """http.answer.Answer of one response, kept in the store once it has ended."""

    turn: Turn
    builder: ResponseBuilder
    reply: Reply
    store: ResponseStore | None
    tenant: str
    messages: list[Message]
    input_items: list[Message]

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self.items()) as items:
            async for _ in items:
                pass
        return self.builder.final

    async def events(self) -> AsyncGenerator[bytes]:
        async with aclosing(self.items()) as items:
            async for item in items:
                for part in long_sse(item, item["type"]):
                    yield part

    def failure(self, error: AnychipError) -> list[bytes]:
        return long_sse(self.builder.fail(str(error), "server_error"), "response.failed")

    async def items(self) -> AsyncGenerator[dict[str, Any]]:
        builder, num_output, reason, last = self.builder, 0, None, None
        async with aclosing(self.turn.pieces()) as pieces:
            async for piece in pieces:
                if last is None:  # nothing is told before the engine has taken the request
                    for item in builder.begin():
                        yield item
                last, reason = piece.request, piece.finish_reason
                num_output += len(piece.output.token_ids)
                if piece.output.logprobs is not None:
                    newest = GrowingList()
                    await newest.extend(self.reply.chat_entries(piece.output))
                    builder.take_logprobs(newest)
                for event in piece.events:
                    for item in builder.take(event):
                        yield item
        for item in builder.end(reason, last, num_output):
            if self.store is not None and item["type"].startswith(("response.completed", "response.incomplete")):
                self._keep(self.store)
            yield item

    def _keep(self, store: ResponseStore) -> None:
        conversation = [*self.messages, self.builder.message()]
        store.put(Stored(self.tenant, self.builder.final, conversation, self.input_items))


def response_routes(serving: Serving) -> APIRouter:
    router, store = APIRouter(), ResponseStore()

    @router.post("/v1/responses", openapi_extra=schema_of(ResponsesBody))
    async def create(request: Request) -> Response:
        body = await read_body(request, ResponsesBody, lenient=serving.config.lenient)
        answer = await accept_response(serving, store, body, Caller.of(request))
        return await respond(answer, request, stream=body.stream)

    @router.get("/v1/responses/{response_id}")
    async def get(response_id: str, request: Request) -> Response:
        return JsonResponse(_found(store, response_id, request.state.tenant).response)

    @router.get("/v1/responses/{response_id}/input_items")
    async def input_items(response_id: str, request: Request) -> Response:
        items = _found(store, response_id, request.state.tenant).input_items
        return JsonResponse({"object": "list", "data": items, "has_more": False})

    @router.delete("/v1/responses/{response_id}")
    async def delete(response_id: str, request: Request) -> Response:
        _found(store, response_id, request.state.tenant)
        store.delete(response_id, request.state.tenant)
        return JsonResponse({"id": response_id, "object": "response.deleted", "deleted": True})

    return router


async def accept_response(
    serving: Serving, store: ResponseStore, body: ResponsesBody, caller: Caller
) -> ResponseAnswer:
    """Checks everything before anything runs. Raises UserError."""
    asked = serving.check_model(body.model)
    serving.check_draws()
    messages = body.messages()
    if not messages:
        raise InvalidRequest("input is empty", param="input")
    before: list[Message] = []
    if body.previous_response_id is not None:
        before = list(_found(store, body.previous_response_id, caller.tenant).messages)
    conversation = [*before, *messages]
    # Instructions are of this response alone: those of the one before are not carried over.
    system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    turn = await Turn.accept(
        serving.llm,
        serving.parsers,
        (builder := ResponseBuilder(body, asked.name)).response_id,
        TurnRequest(
            messages=system + conversation,
            sampling=body.sampling(serving.llm.sampling_defaults),
            tools=[tool.tool() for tool in body.tools or ()],
            tool_choice=body.choice(),
            options=serving.options(
                caller,
                body.deadline,
                priority=body.priority,
                cache_salt=body.cache_salt,
                truncate_prompt_tokens=-1 if body.truncation == "auto" else None,
                adapter=asked.adapter,
            ),
            template_variables=(
                {"reasoning_effort": body.reasoning.effort} if body.reasoning and body.reasoning.effort else {}
            ),
        ),
    )
    return ResponseAnswer(
        turn=turn,
        builder=builder,
        reply=Reply(reply_id="", kind="response", model=asked.name, tokenizer=serving.llm.tokenizer),
        store=None if body.store is False else store,
        tenant=caller.tenant,
        messages=conversation,
        input_items=[{"type": "message", **message} for message in messages],
    )


def _found(store: ResponseStore, response_id: str, tenant: str) -> Stored:
    """Raises UnknownResponse, also for another key's."""
    stored = store.get(response_id, tenant)
    if stored is None:
        raise UnknownResponse(f"response {response_id[:80]!r} is not stored here")
    return stored
