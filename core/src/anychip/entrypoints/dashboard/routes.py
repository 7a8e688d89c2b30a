"""Serves the page's files and the numbers that it shows."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.exceptions import HTTPException

import anychip
from anychip.entrypoints.serving import Serving

_PAGE = files("anychip.entrypoints.dashboard") / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"


def dashboard_routes(serving: Serving) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    known = {entry.name: entry for entry in _PAGE.iterdir() if entry.is_file()}

    def file(name: str) -> Response:
        suffix = name[name.rfind(".") :]
        if name not in known or suffix not in _TYPES:
            raise HTTPException(404, "no such file")
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(known[name].read_bytes(), media_type=f"{_TYPES[suffix]}; charset=utf-8", headers=headers)

    @router.get("/")
    async def page() -> Response:
        return file("index.html")

    @router.get("/ui/{name}")
    async def asset(name: str) -> Response:
        return file(name)

    @router.get("/debug/state")
    async def state() -> dict[str, Any]:
        """What does not change while the engine runs, and how it stands now; rates come from /metrics."""
        llm = serving.llm
        memory = llm.worker.memory
        return {
            "version": anychip.__version__,
            "model": serving.model,
            "task": llm.served.task,
            "max_model_len": llm.max_model_len,
            "device": llm.worker.device,
            "alive": llm.dead is None,
            "silent_s": round(llm.silent_s, 2),
            "memory": {name: getattr(memory, name) for name in memory.__struct_fields__},
            "capabilities": llm.worker.capabilities,
            "notes": list(llm.worker.notes),
            "tool_parser": serving.parsers.tools,
            "reasoning_parser": serving.parsers.reasoning,
        }

    return router
