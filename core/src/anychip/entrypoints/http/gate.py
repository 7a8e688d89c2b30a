"""The door that every request comes through: its id, its key, the size of its body, its line in the log."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anychip.entrypoints.http.errors import error_response
from anychip.entrypoints.http.keys import Keys, given_key
from anychip.errors import BodyTooLarge
from anychip.observability.metrics import Metrics

log = logging.getLogger("anychip.http")

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/openapi.json"})
"""Asked for by load balancers, scrapers and browsers, which have no key; none of them tells what was asked."""

_MAX_ID = 128


class Gate:
    """ASGI middleware. Puts `tenant` and `request_id` into the scope's state."""

    def __init__(self, app: ASGIApp, *, keys: Keys, metrics: Metrics, max_body_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._max_body = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, path = time.perf_counter(), 500, scope["path"]
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        refused = self._refusal(scope, headers, request_id)
        try:
            if refused is not None:
                await refused(scope, receive, watched_send)
            else:
                await self._app(scope, self._bounded(receive), watched_send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - began
            self._metrics.http_requests.labels(scope["method"], route, str(status)).inc()
            self._metrics.http_seconds.labels(route).observe(seconds)
            tenant = scope.get("state", {}).get("tenant", "")
            log.info(
                "%s %s %d %.3f s", scope["method"], path, status, seconds,
                extra={"request_id": request_id, "tenant": tenant, "status": status, "seconds": round(seconds, 6)},
            )  # fmt: skip

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], request_id: str) -> Any:
        """The answer to a request that may not enter; None to others."""
        path = scope["path"]
        tenant = self._keys.tenant(given_key(headers))
        scope.setdefault("state", {}).update(request_id=request_id, tenant=tenant or "")
        if tenant is None and path not in OPEN_PATHS and not path.startswith("/ui/"):
            return error_response(path, 401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            return error_response(path, 413, f"the body has {length.decode('latin-1')} bytes, at most {self._max_body}")
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """The same messages, until the body has become too long."""
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._max_body:
                    raise BodyTooLarge(f"the body is longer than {self._max_body} bytes")
            return message

        return bounded


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    if 0 < len(text) <= _MAX_ID and text.isprintable() and text.isascii():
        return text
    return uuid.uuid4().hex
