"""Whenever a client leaves, the generation of its answer ends at once, and not when garbage is collected."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator

import pytest
from fastapi import Request

from anychip.entrypoints.http.answer import respond
from anychip.errors import AnychipError

TICKS = 12
"""Turns of the loop from the request's first to one in the middle of its stream."""


class Endless:
    """An answer that never ends by itself."""

    def __init__(self, ticks: int) -> None:
        self.ticks = ticks
        self.open = 0

    async def whole(self) -> dict[str, object]:
        self.open += 1
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            self.open -= 1

    async def events(self) -> AsyncGenerator[bytes]:
        self.open += 1
        try:
            while True:
                for _ in range(self.ticks):
                    await asyncio.sleep(0)
                yield b"data: {}\n\n"
        finally:
            self.open -= 1

    def failure(self, error: AnychipError) -> list[bytes]:
        return []


@pytest.fixture(autouse=True)
def no_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ticks", [0, 1, 3])
@pytest.mark.parametrize("taken", [0, 1, 3, 1000])
def test_an_answer_ends_with_its_client(stream, ticks, taken):
    """The client takes so many messages of the answer, then no more, and leaves at any turn of the loop."""

    async def leave_after(turns: int) -> None:
        answer, gone, messages = Endless(ticks), asyncio.Event(), 0

        async def receive() -> dict[str, object]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: object) -> None:
            nonlocal messages
            messages += 1
            await (asyncio.sleep(0) if messages <= taken else asyncio.get_running_loop().create_future())

        async def serve() -> object:
            scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "asgi": {"spec_version": "2.3"}}
            response = await respond(answer, Request(scope, receive), stream=stream)
            if response.status_code == 200:
                await response(scope, receive, send)
            return response  # kept alive, as a traceback or a log's record would keep it

        serving = asyncio.create_task(serve())
        for _ in range(turns):
            await asyncio.sleep(0)
        gone.set()
        kept = await serving
        assert answer.open == 0, f"left after {turns} turns: {kept}"

    for turns in range(TICKS):
        asyncio.run(leave_after(turns))


def test_an_answer_ends_with_its_server():
    """A server that is told to stop cancels what serves the request."""

    async def cancel_after(turns: int) -> None:
        answer = Endless(1)

        async def never(*_: object) -> dict[str, object]:
            return await asyncio.get_running_loop().create_future()

        async def serve() -> None:
            scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "asgi": {"spec_version": "2.3"}}
            await (await respond(answer, Request(scope, never), stream=True))(scope, never, never)

        serving = asyncio.create_task(serve())
        for _ in range(turns):
            await asyncio.sleep(0)
        serving.cancel()
        ended = (await asyncio.gather(serving, return_exceptions=True))[0]
        assert answer.open == 0, f"cancelled after {turns} turns: {ended!r}"

    for turns in range(TICKS):
        asyncio.run(cancel_after(turns))
