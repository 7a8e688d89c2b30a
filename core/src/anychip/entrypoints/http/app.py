"""The HTTP application: every API's routes behind one gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import anychip
from anychip.entrypoints.anthropic.routes import BODIES as ANTHROPIC_BODIES
from anychip.entrypoints.anthropic.routes import anthropic_routes
from anychip.entrypoints.dashboard.routes import dashboard_routes
from anychip.entrypoints.http.body import schema_parts
from anychip.entrypoints.http.errors import install_error_handlers
from anychip.entrypoints.http.gate import Gate
from anychip.entrypoints.http.operations import operation_routes
from anychip.entrypoints.openai.routes import BODIES as OPENAI_BODIES
from anychip.entrypoints.openai.routes import openai_routes
from anychip.entrypoints.openai.stateful.routes import response_routes
from anychip.entrypoints.serving import Serving
from anychip.entrypoints.vectors.routes import BODIES as VECTOR_BODIES
from anychip.entrypoints.vectors.routes import vector_routes
from anychip.launch.async_llm import AsyncLLM
from anychip.server_config import ServerConfig


def make_app(llm: AsyncLLM, config: ServerConfig | None = None) -> ASGIApp:
    """`llm` has been started. Raises ConfigError for keys or parsers that cannot be."""
    serving = Serving.of(llm, config)
    app = FastAPI(title="anychip", version=anychip.__version__, docs_url=None, redoc_url=None)
    makers: list[Callable[[Serving], APIRouter]] = [
        openai_routes, response_routes, anthropic_routes, vector_routes, operation_routes,
    ]  # fmt: skip
    if serving.config.ui:
        makers.append(dashboard_routes)
    routers = [make(serving) for make in makers]
    for router in routers:
        app.include_router(router)
    install_error_handlers(app, *routers)
    _complete_document(app)
    gated: ASGIApp = Gate(app, keys=serving.keys, metrics=llm.metrics, max_body_bytes=serving.config.max_body_bytes)
    if serving.config.cors_origins:  # closed unless the operator opens it
        gated = CORSMiddleware(
            gated,
            allow_origins=serving.config.cors_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],  # clients' libraries send headers of their own; what is read is checked all the same
            expose_headers=["x-request-id", "retry-after"],
        )
    return gated


def _complete_document(app: FastAPI) -> None:
    """The OpenAPI document, with the parts that the bodies' schemas refer to: routes read their bodies themselves."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {}).setdefault("schemas", {}).update(
            schema_parts(*OPENAI_BODIES, *ANTHROPIC_BODIES, *VECTOR_BODIES)
        )
        return document

    app.openapi = complete  # type: ignore[method-assign]
