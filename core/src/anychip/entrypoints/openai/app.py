"""The HTTP application: routes, and how errors look. Generation itself is generation.py's."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import anychip
from anychip.entrypoints.openai.generation import Generation, start_chat, start_completion
from anychip.entrypoints.openai.protocol import ChatBody, CompletionBody
from anychip.entrypoints.openai.responses import error_body
from anychip.errors import AnychipError, EngineDead, RequestAborted, UnknownModel, UserError
from anychip.launch.async_llm import AsyncLLM

CLIENT_CLOSED = 499


def make_app(llm: AsyncLLM, *, api_key: str | None = None) -> FastAPI:
    """`llm` has been started. With an API key, every /v1 route asks for it."""
    app = FastAPI(
        title="anychip", version=anychip.__version__, docs_url=None, redoc_url=None, strict_content_type=False
    )
    created = int(time.time())

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        _check_model(llm, body.model)
        return await _answer(start_chat(llm, body), request, stream=body.stream)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        _check_model(llm, body.model)
        return await _answer(start_completion(llm, body), request, stream=body.stream)

    def card() -> dict[str, Any]:
        return {
            "id": llm.config.public_name,
            "object": "model",
            "created": created,
            "owned_by": "anychip",
            "max_model_len": llm.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(llm, model)
        return card()

    @app.get("/health")
    async def health() -> Response:
        if llm.dead is not None:
            raise EngineDead(str(llm.dead))
        return Response(status_code=200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": anychip.__version__}

    if api_key is not None:
        _require_key(app, api_key)
    _install_error_handlers(app)
    return app


async def _answer(generation: Generation, request: Request, *, stream: bool) -> Response:
    if stream:
        return StreamingResponse(_until_gone(generation), media_type="text/event-stream")
    work = asyncio.create_task(generation.whole())
    gone = asyncio.create_task(_disconnected(request))
    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not work.done():
        work.cancel()  # closes the engine streams, which aborts their requests
        await asyncio.gather(work, return_exceptions=True)
        return Response(status_code=CLIENT_CLOSED)
    try:
        return JSONResponse(work.result())
    except BaseExceptionGroup as group:
        raise _first(group) from group


async def _until_gone(generation: Generation) -> AsyncIterator[bytes]:
    events = generation.events()
    try:
        async for event in events:
            yield event
    finally:
        await events.aclose()  # type: ignore[attr-defined]


async def _disconnected(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _check_model(llm: AsyncLLM, model: str | None) -> None:
    if model is not None and model != llm.config.public_name:
        raise UnknownModel(f"model {model!r} does not exist; this server serves {llm.config.public_name!r}")


def _require_key(app: FastAPI, api_key: str) -> None:
    expected = f"Bearer {api_key}".encode()

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Response:
        given = request.headers.get("authorization", "").encode()
        if request.url.path.startswith("/v1") and not hmac.compare_digest(given, expected):
            return _error(401, "the API key is missing or wrong", kind="authentication_error", code="invalid_api_key")
        response: Response = await call_next(request)
        return response


def _install_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> Response:
        return _error(error.status, str(error), param=error.param, code=error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(_: Request, error: RequestValidationError) -> Response:
        message, param = _describe(error)
        return _error(400, message, param=param, code="invalid_request")

    @app.exception_handler(AnychipError)
    async def engine_error(_: Request, error: AnychipError) -> Response:
        status = 503 if isinstance(error, EngineDead) else 409 if isinstance(error, RequestAborted) else 500
        return _error(status, str(error), kind="server_error", code=type(error).__name__)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")


def _describe(error: RequestValidationError) -> tuple[str, str | None]:
    """The first problem of a body, in one sentence, and the parameter it lies in."""
    first = error.errors()[0]
    names = [part for part in first["loc"][1:] if isinstance(part, str)]
    param = names[0] if names and first["type"] != "json_invalid" else None
    if first["type"] == "extra_forbidden":
        name = ".".join(str(part) for part in first["loc"][1:])
        return f"unknown parameter {name!r}", name
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    if not first["loc"][1:]:
        return "the body is not a JSON object; is it sent with Content-Type: application/json?", None
    where = f"{param}: " if param else ""
    return f"{where}{first['msg']}", param


def _error(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(message, kind=kind, param=param, code=code), status_code=status)
