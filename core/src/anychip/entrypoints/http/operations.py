"""Routes for those who run the server: is it alive, does it get on, what does it measure."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

import anychip
from anychip.entrypoints.serving import Serving
from anychip.errors import EngineDead
from anychip.observability.metrics import CONTENT_TYPE


def operation_routes(serving: Serving) -> APIRouter:
    router, llm = APIRouter(), serving.llm

    @router.get("/health")
    async def health() -> Response:
        """Whether there is an engine: not while one that died or hung is replaced."""
        if llm.dead is not None:
            raise EngineDead(str(llm.dead))
        return Response(status_code=200)

    @router.get("/ready")
    async def ready() -> Response:
        """Whether requests get on: an engine that gave a sign of life within the last seconds, as one in a long step
        does."""
        if llm.dead is not None:
            raise EngineDead(str(llm.dead))
        if llm.silent_s > serving.config.ready_within_s:
            allowed = serving.config.ready_within_s
            raise EngineDead(f"the engine has given no sign of life for {llm.silent_s:.1f} s, {allowed:.0f} may pass")
        return JSONResponse({"status": "ready"})

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": anychip.__version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(llm.metrics.render(), media_type=CONTENT_TYPE)

    @router.get("/debug/kernels")
    async def kernels() -> dict[str, Any]:
        """Which kernel serves each op, and why."""
        worker = llm.worker
        return {"device": worker.device, "ops": worker.kernels, "notes": list(worker.notes)}

    return router
