"""How errors look to clients of each API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from anychip.errors import AnychipError, EngineDead, QueueFull, RequestAborted, StepFailed, UserError

_ANTHROPIC_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(path: str, status: int, message: str, **fields: Any) -> JSONResponse:
    """In the form of the API that the path belongs to."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_KINDS.get(status, "api_error")
        return JSONResponse({"type": "error", "error": {"type": kind, "message": message}}, status_code=status)
    if status == 401:
        fields.setdefault("kind", "authentication_error")
    return JSONResponse(error_body(message, **fields), status_code=status)


def response_of(path: str, error: AnychipError) -> JSONResponse:
    """What a client is told of an error that anychip raised on purpose."""
    if isinstance(error, UserError):
        response = error_response(path, error.status, str(error), param=error.param, code=error.code)
        if isinstance(error, QueueFull) and error.retry_after is not None:
            response.headers["Retry-After"] = str(error.retry_after)
        return response
    status = 503 if isinstance(error, EngineDead | StepFailed) else 409 if isinstance(error, RequestAborted) else 500
    response = error_response(path, status, str(error), kind="server_error", code=type(error).__name__)
    if status == 503:
        response.headers["Retry-After"] = "5"
    return response


def install_error_handlers(app: FastAPI, *routers: APIRouter) -> None:
    """Every error that leaves a route; `routers` hold the application's routes."""

    @app.exception_handler(AnychipError)
    async def on_purpose(request: Request, error: AnychipError) -> Response:
        return response_of(request.url.path, error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path, headers = request.url.path, dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(routers, path))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        response = error_response(path, error.status_code, f"{request.method} {path}: {error.detail}")
        response.headers.update(headers)
        return response


def _methods(routers: Sequence[APIRouter], path: str) -> list[str]:
    """What a path answers to. The framework names the methods of the first route alone that fits it."""
    routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
    found = {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
    return sorted(found | {"OPTIONS"} | ({"HEAD"} if "GET" in found else set()))
