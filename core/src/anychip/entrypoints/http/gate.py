"""The door that every request comes through: its id, its key and what that key may have open, its body, its line in
the log."""

from __future__ import annotations

import logging
import time
import uuid
from contextlib import ExitStack
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anychip.entrypoints.http.errors import error_response, response_of
from anychip.entrypoints.http.incoming import ACCEPTED, Incoming
from anychip.entrypoints.http.keys import Keys, given_key
from anychip.errors import QueueFull
from anychip.observability.metrics import Metrics

log = logging.getLogger("anychip.http")

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/openapi.json"})
"""Asked for by load balancers, scrapers and browsers, which have no key; none of them tells what was asked."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""What metrics call by name: a client may invent others."""

_MAX_ID = 128
_MAX_SHOWN = 200
"""Characters of a path in the log."""


class Gate:
    """ASGI middleware. Puts `tenant` and `request_id` into the scope's state.

    A POST counts among what its key has open until its response has ended, a stream's last byte included; what is only
    looked up does not. HEAD is answered wherever GET is.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, metrics: Metrics, max_body_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._max_body = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, method = time.perf_counter(), 500, scope["method"]
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        if method == "HEAD":
            scope = {**scope, "method": "GET"}

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif method == "HEAD":
                message["body"] = b""
            await send(message)

        tenant = self._keys.tenant(given_key(headers))
        scope.setdefault("state", {}).update(request_id=request_id, tenant=tenant or "")
        try:
            with ExitStack() as open_requests:
                refused = self._refusal(scope, headers, tenant)
                if refused is None and method == "POST":
                    try:
                        open_requests.enter_context(self._keys.holding(tenant or ""))
                    except QueueFull as full:
                        refused = response_of(scope["path"], full)
                if refused is not None:
                    await refused(scope, receive, watched_send)
                else:
                    encoding = _encoding(headers)
                    incoming = Incoming(receive, max_bytes=self._max_body, encoding=encoding or None)
                    await self._app(scope, incoming, watched_send)
        finally:
            self._record(scope, method, status, time.perf_counter() - began)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], tenant: str | None) -> JSONResponse | None:
        """The answer to a request that may not enter; None to others."""
        path = scope["path"]
        if tenant is None and path not in OPEN_PATHS and not path.startswith("/ui/") and scope["method"] != "OPTIONS":
            return error_response(path, 401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return error_response(path, 400, "Content-Length is no number")
        if len(length) > len(str(self._max_body)) or int(length) > self._max_body:
            shown = length.decode()[:_MAX_SHOWN]
            return error_response(path, 413, f"the body has {shown} bytes, at most {self._max_body} may be sent")
        if (encoding := _encoding(headers)) and encoding not in ACCEPTED:
            accepted = ", ".join(ACCEPTED)
            message = f"Content-Encoding {encoding[:40]!r} is not read; send {accepted} or none"
            refused = error_response(path, 415, message)
            refused.headers["Accept-Encoding"] = accepted
            return refused
        return None

    def _record(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        """Metrics and log take nothing from the client without a bound."""
        method = method if method in _METHODS else "other"
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.http_requests.labels(method, route, str(status)).inc()
        self._metrics.http_seconds.labels(route).observe(seconds)
        state: dict[str, Any] = scope["state"]
        log.info(
            "%s %s %d %.3f s", method, _shown(scope["path"]), status, seconds,
            extra={
                "request_id": state["request_id"], "tenant": state["tenant"], "status": status,
                "seconds": round(seconds, 6),
            },
        )  # fmt: skip


def _encoding(headers: dict[bytes, bytes]) -> str:
    """The body's; "" for a body as it is."""
    given = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    return {"identity": "", "x-gzip": "gzip"}.get(given, given)


def _shown(path: str) -> str:
    """A path for one line of the log, whatever the client has put into it."""
    cut = path[:_MAX_SHOWN]
    return cut if cut.isprintable() and cut.isascii() else ascii(cut)[1:-1]


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    if 0 < len(text) <= _MAX_ID and text.isprintable() and text.isascii():
        return text
    return uuid.uuid4().hex
