"""Routes of vectors, scores and labels, in the forms of OpenAI, Jina, Cohere, vLLM and Text Embeddings Inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from anychip.entrypoints.http.answer import respond
from anychip.entrypoints.http.body import Strict, read_body, schema_of
from anychip.entrypoints.serving import Caller, Serving
from anychip.entrypoints.vectors import answers
from anychip.entrypoints.vectors.protocol import (
    ClassifyBody,
    EmbeddingBody,
    PoolingBody,
    RerankBody,
    ScoreBody,
    TeiEmbedBody,
    TeiPredictBody,
)

BODIES: tuple[type[Strict], ...] = (
    EmbeddingBody, ClassifyBody, PoolingBody, RerankBody, ScoreBody, TeiEmbedBody, TeiPredictBody,
)  # fmt: skip


def vector_routes(serving: Serving) -> APIRouter:
    router, lenient = APIRouter(), serving.config.lenient

    def add(kind: type[Strict], accept: Callable[..., answers.Answer], *paths: str, **more: Any) -> None:
        async def handle(request: Request) -> Response:
            body = await read_body(request, kind, lenient=lenient)
            return await respond(accept(serving, body, Caller.of(request), **more), request, stream=False)

        for path in paths:
            name = path.strip("/").replace("/", "_")
            router.add_api_route(path, handle, methods=["POST"], name=name, openapi_extra=schema_of(kind))

    add(EmbeddingBody, answers.accept_embeddings, "/v1/embeddings", "/embeddings")
    add(RerankBody, answers.accept_rerank, "/rerank", "/v1/rerank")
    add(RerankBody, answers.accept_rerank, "/v2/rerank", cohere=True)
    add(ScoreBody, answers.accept_score, "/score", "/v1/score")
    add(ClassifyBody, answers.accept_classify, "/classify")
    add(PoolingBody, answers.accept_pooling, "/pooling")
    add(TeiEmbedBody, answers.accept_tei_embed, "/embed")
    add(TeiPredictBody, answers.accept_predict, "/predict")
    return router
