"""JSON of any length without holding up the event loop: long lists are made and encoded in pieces, and sent as such."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

FEW = 32
"""Entries up to which a list is no long one."""

_PIECE_S = 0.001
"""Of work, after which others have their turn."""

_PIECE_BYTES = 2**16
"""Up to which a piece takes in what comes later."""


class LongList:
    """A list as JSON, in pieces. No dataclass: msgspec would write that as an object, and not ask `encoded` for it."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces


class GrowingList:
    """A list that gets its entries bit by bit, and is JSON from the first on."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    async def extend(self, entries: Iterable[Any]) -> None:
        """`entries` are made as they are asked for."""
        texts: list[bytes] = []
        grows = bool(self._pieces) and len(self._pieces[-1]) < _PIECE_BYTES
        began = time.perf_counter()
        for entry in entries:
            # At once, so that no objects pile up: the garbage collector would look at all there are, time and again.
            texts.append(msgspec.json.encode(entry))
            if time.perf_counter() - began > _PIECE_S:
                self._add(texts, grows=grows)
                texts.clear()
                grows = False
                await asyncio.sleep(0)
                began = time.perf_counter()
        if texts:
            self._add(texts, grows=grows)

    def _add(self, texts: list[bytes], *, grows: bool) -> None:
        """To the last piece, or as one of its own."""
        text = (b"," if self._pieces else b"[") + b",".join(texts)
        if grows:
            self._pieces[-1] += text
        else:
            self._pieces.append(text)

    def join(self, other: GrowingList) -> None:
        """The other's entries follow, and stay in the other."""
        for piece in other._pieces:
            grows = bool(self._pieces) and len(self._pieces[-1]) < _PIECE_BYTES
            self._add([piece[1:]], grows=grows)

    def so_far(self) -> list[Any] | LongList:
        return LongList([*self._pieces, b"]"]) if self._pieces else []


async def listed(entries: Iterable[T], length: int) -> list[T] | LongList:
    """The `length` entries, which are made as they are asked for."""
    if length <= FEW:
        return list(entries)
    made = GrowingList()
    await made.extend(entries)
    return made.so_far()


def encoded(content: Any) -> list[bytes]:
    """A value with LongLists in it as JSON, in pieces."""
    found: list[LongList] = []
    mark = uuid.uuid4().hex  # stands for a long list meanwhile, and nobody can have written it

    def replaced(value: Any) -> str:
        assert isinstance(value, LongList), value
        found.append(value)
        return f"{mark}{len(found) - 1}"

    text = msgspec.json.encode(content, enc_hook=replaced)
    if not found:
        return [text]
    pieces: list[bytes] = []
    for number, part in enumerate(re.split(b'"' + mark.encode() + rb'(\d+)"', text)):
        pieces += [part] if number % 2 == 0 else found[int(part)].pieces
    return pieces


class JsonResponse(Response):
    """A whole answer. Numbers that JSON does not have are null."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._pieces = encoded(content)
        super().__init__(status_code=status_code, headers=headers)
        self.headers["content-length"] = str(sum(map(len, self._pieces)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            if len(self._pieces) > 1:
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
