"""Routes that change how the server runs: on a port of their own, with a key of their own. Without the key nothing is
there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp

from anychip.entrypoints.http.body import Strict, read_body
from anychip.entrypoints.http.errors import error_response, install_error_handlers
from anychip.entrypoints.http.keys import Keys, given_key
from anychip.errors import AdapterRefused
from anychip.launch.adapters import NamedAdapter
from anychip.launch.async_llm import AsyncLLM
from anychip.observability.metrics import CONTENT_TYPE
from anychip.server_config import ServerConfig

_MAX_SHOWN = 200
"""Characters of a path in a message."""


class LoadAdapterBody(Strict):
    """Names as vLLM has them."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(Strict):
    lora_name: str


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

    @app.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request) -> dict[str, Any]:
        """Loads an adapter, or with load_inplace puts new content behind a name. Answers once requests may have it."""
        body = await read_body(request, LoadAdapterBody, lenient=False)
        folder = allowed_folder(config.adapter_folder, body.lora_path)
        return _about(await llm.adapters.load(body.lora_name, str(folder), replace=body.load_inplace))

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request) -> dict[str, Any]:
        """No request begins with the adapter any more; those that have it end first."""
        body = await read_body(request, UnloadAdapterBody, lenient=False)
        return _about(await llm.adapters.unload(body.lora_name))

    @app.get("/admin/adapters")
    async def adapters() -> dict[str, Any]:
        return {"adapters": [_about(adapter) for adapter in llm.adapters.names]}

    @app.get("/admin/requests")
    async def requests() -> Response:
        """Ids of the requests that run, without what they say."""
        return JSONResponse({"open": llm.engine.open_requests, "waiting": llm.flow.waiting})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(llm.metrics.render(), media_type=CONTENT_TYPE)

    install_error_handlers(app, app.router)
    return app


def allowed_folder(allowed: str | None, asked: str) -> Path:
    """The folder of a path that is within the allowed folder, links followed; a relative one begins there. Raises
    AdapterRefused for any other, whether it exists or not."""
    if allowed is None:
        raise AdapterRefused(
            "no folder is allowed to load adapters from; start the server with --adapter-folder FOLDER"
        )
    root = Path(allowed).resolve()
    folder = (root / asked).resolve()
    if not folder.is_relative_to(root) or folder == root:
        raise AdapterRefused(f"lora_path {asked[:_MAX_SHOWN]!r} is not a folder within --adapter-folder {allowed}")
    return folder


def _about(adapter: NamedAdapter) -> dict[str, Any]:
    return {"lora_name": adapter.name, "lora_path": adapter.folder, "digest": adapter.digest.hex()}
