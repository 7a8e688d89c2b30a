"""From a generation to an HTTP response: whole or as server-sent events, and ended when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from anychip.entrypoints.http.long_json import JsonResponse, encoded
from anychip.errors import AnychipError

CLIENT_CLOSED = 499
T = TypeVar("T")


class Answer(Protocol):
    """One request's generation, accepted, in the form of its API."""

    async def whole(self) -> dict[str, Any]:
        """The response, once everything has ended. Leaving it early aborts what runs."""
        ...

    def events(self) -> AsyncGenerator[bytes]:
        """The response as server-sent events. Closing it early aborts what runs."""
        ...

    def failure(self, error: AnychipError) -> list[bytes]:
        """The events of an error that comes when the status has been sent."""
        ...


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def respond(answer: Answer, request: Request, *, stream: bool) -> Response:
    """Errors before the first event keep their status: a stream's headers are sent with its first event."""
    try:
        if not stream:
            return JsonResponse(await _unless_gone(answer.whole(), request))
        return await _streamed(answer, request)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)


def sse(content: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    return _head(event) + msgspec.json.encode(content) + b"\n\n"


def long_sse(content: Any, event: str | None = None) -> list[bytes]:
    """One server-sent event that may hold LongLists, in pieces."""
    first, *rest = encoded(content)
    return [_head(event) + first, *rest, b"\n\n"] if rest else [_head(event) + first + b"\n\n"]


def _head(event: str | None) -> bytes:
    return b"data: " if event is None else b"event: " + event.encode() + b"\ndata: "


async def _streamed(answer: Answer, request: Request) -> Response:
    events = answer.events()
    try:
        first = await _unless_gone(_next(events), request)
    except BaseException:
        await events.aclose()
        raise
    return _EventStream(first, events, answer)


class _EventStream(StreamingResponse):
    """Closes its events whatever ends it. Left to the garbage collector, a generation whose client is gone would run
    until something collects it."""

    def __init__(self, first: bytes | None, events: AsyncGenerator[bytes], answer: Answer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self._content, self._events = _after(first, events, answer), events
        super().__init__(self._content, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._content.aclose()
            await self._events.aclose()  # which closing the content does not


async def _after(first: bytes | None, events: AsyncGenerator[bytes], answer: Answer) -> AsyncGenerator[bytes]:
    try:
        if first is not None:
            yield first
        async for event in events:
            yield event
    except AnychipError as error:
        for event in answer.failure(error):
            yield event


async def _next(events: AsyncGenerator[bytes]) -> bytes | None:
    return await anext(events, None)


async def _unless_gone(work: Coroutine[Any, Any, T], request: Request) -> T:
    """Raises ClientGone, with the work cancelled, when the client leaves first."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()  # closes the engine's streams, which aborts their requests
            await asyncio.gather(task, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
