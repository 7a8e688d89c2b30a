"""Routes that change how the server runs: on a port of their own, with a key of their own. Without the key nothing is
there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp

from anychip.config import ServerConfig
from anychip.entrypoints.http.body import Strict, read_body
from anychip.entrypoints.http.errors import error_response, install_error_handlers
from anychip.entrypoints.http.keys import Keys, given_key
from anychip.launch.async_llm import AsyncLLM
from anychip.observability.metrics import CONTENT_TYPE


class LogLevelBody(Strict):
    level: Literal["debug", "info", "warning", "error"]


def make_admin_app(llm: AsyncLLM, config: ServerConfig, stop: Callable[[], None]) -> ASGIApp:
    """`stop` begins the drain."""
    app = FastAPI(title="anychip admin", docs_url=None, redoc_url=None, openapi_url=None)
    keys = Keys.of(config.admin_key, None, None)

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Response:
        if keys.tenant(given_key(dict(request.scope["headers"]))) is None:
            return error_response(request.url.path, 404, f"{request.method} {request.url.path}: Not Found")
        response: Response = await call_next(request)
        return response

    @app.post("/admin/drain")
    async def drain() -> dict[str, Any]:
        """Ends the server once the requests in flight have ended."""
        stop()
        return {"draining": True, "open_requests": len(llm.engine.open_requests)}

    @app.post("/admin/abort/{request_id}")
    async def abort(request_id: str) -> dict[str, Any]:
        """Ends a request, whose client is told so."""
        return {"aborted": await llm.abort(request_id)}

    @app.post("/admin/restart-engine")
    async def restart() -> dict[str, Any]:
        """Ends the engine; requests in flight fail, and a new engine starts."""
        llm.kill_engine("an administrator asked for a new one")
        return {"restarting": True}

    @app.post("/admin/log-level")
    async def log_level(request: Request) -> dict[str, Any]:
        body = await read_body(request, LogLevelBody, lenient=False)
        logging.getLogger("anychip").setLevel(body.level.upper())
        return {"level": body.level}

    @app.get("/admin/requests")
    async def requests() -> Response:
        """Ids of the requests that run, without what they say."""
        return JSONResponse({"open": llm.engine.open_requests, "waiting": llm.flow.waiting})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(llm.metrics.render(), media_type=CONTENT_TYPE)

    install_error_handlers(app, app.router)
    return app
