"""OpenAI's routes, and the tokenizer's beside them."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from anychip.entrypoints.http.answer import respond
from anychip.entrypoints.http.body import read_body, schema_of
from anychip.entrypoints.http.long_json import JsonResponse
from anychip.entrypoints.openai.chat import accept_chat
from anychip.entrypoints.openai.chat_protocol import ChatBody
from anychip.entrypoints.openai.completions import accept_completion
from anychip.entrypoints.openai.protocol import CompletionBody
from anychip.entrypoints.openai.stateful.protocol import ResponsesBody
from anychip.entrypoints.openai.tokens import DetokenizeBody, TokenizeBody, detokenize, tokenize
from anychip.entrypoints.serving import Caller, Serving

BODIES = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, ResponsesBody)


def openai_routes(serving: Serving) -> APIRouter:
    router, created, lenient = APIRouter(), int(time.time()), serving.config.lenient

    @router.post("/v1/chat/completions", openapi_extra=schema_of(ChatBody))
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody, lenient=lenient)
        return await respond(await accept_chat(serving, body, Caller.of(request)), request, stream=body.stream)

    @router.post("/v1/completions", openapi_extra=schema_of(CompletionBody))
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody, lenient=lenient)
        return await respond(await accept_completion(serving, body, Caller.of(request)), request, stream=body.stream)

    @router.post("/tokenize", openapi_extra=schema_of(TokenizeBody))
    async def tokenize_text(request: Request) -> Response:
        return JsonResponse(await tokenize(serving, await read_body(request, TokenizeBody, lenient=lenient)))

    @router.post("/detokenize", openapi_extra=schema_of(DetokenizeBody))
    async def detokenize_ids(request: Request) -> Response:
        return JsonResponse(await detokenize(serving, await read_body(request, DetokenizeBody, lenient=lenient)))

    def card(name: str) -> dict[str, Any]:
        """Of the model, or of an adapter, whose `parent` is the model."""
        about = {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "anychip",
            "max_model_len": serving.llm.max_model_len,
        }
        return about if name == serving.model else {**about, "root": name, "parent": serving.model}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = [serving.model, *(adapter.name for adapter in serving.llm.adapters.names)]
        return {"object": "list", "data": [card(name) for name in names]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return card(serving.check_model(model).name)

    return router
