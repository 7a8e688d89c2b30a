"""A request's body on its way in: unpacked where it comes compressed, no longer than a body may be, and in time."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator

from starlette.types import Message, Receive

from anychip.errors import BodyTooLarge, InvalidRequest, RequestTimeout

ACCEPTED = ("gzip", "deflate")
"""Content-Encodings that are read."""

_PIECE = 64 * 1024
"""Bytes that are unpacked at once: a fraction of a millisecond."""

_FIRST_S, _SLOWEST = 30.0, 16 * 1024
"""A body has so many seconds, and one more for so many bytes that came."""

_GZIP, _ZLIB, _RAW = 31, 15, -15
"""Window bits of zlib's forms. Clients mean either of the last two by "deflate"."""


class Incoming:
    """ASGI's `receive` for the application. `encoding` is one of ACCEPTED, or None for a body as it is.

    Raises BodyTooLarge beyond `max_bytes`, counted as they come and unpacked; RequestTimeout for a body that trickles;
    InvalidRequest for one that is not in its encoding.
    """

    def __init__(self, receive: Receive, *, max_bytes: int, encoding: str | None) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._unpacking = None if encoding is None else Unpacking(encoding)
        self._pieces: Iterator[bytes] = iter(())
        self._began: float | None = None
        self._arrived = 0
        self._taken = 0
        self._more = True

    async def __call__(self) -> Message:
        if self._unpacking is None:
            message = await self._next()
            if message["type"] == "http.request":
                self._count(len(message.get("body", b"")))
            return message
        while True:
            piece = next(self._pieces, None)
            if piece is not None:
                self._count(len(piece))
                await asyncio.sleep(0)  # a small body may unpack to a large one: others have their turn in between
                return {"type": "http.request", "body": piece, "more_body": True}
            ended = not self._more
            message = await self._next()
            if ended or message["type"] != "http.request":
                return message
            self._pieces = self._unpacking.feed(message.get("body", b""))
            if not self._more:
                return await self._last(self._unpacking)

    async def _last(self, unpacking: Unpacking) -> Message:
        """What the last message unpacks to, as one."""
        rest = []
        for piece in self._pieces:
            self._count(len(piece))
            rest.append(piece)
            await asyncio.sleep(0)
        unpacking.finish()
        return {"type": "http.request", "body": b"".join(rest), "more_body": False}

    async def _next(self) -> Message:
        """The next message; once the body is whole, the client may take as long as it likes to go away."""
        if not self._more:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._began is None:
            self._began = loop.time()
        allowed = _FIRST_S + self._arrived / _SLOWEST
        try:
            async with asyncio.timeout_at(self._began + allowed):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeout(
                f"{self._arrived} bytes of the body came in {allowed:.0f} s; send it faster, or in parts"
            ) from None
        self._more = message["type"] == "http.request" and message.get("more_body", False)
        self._arrived += len(message.get("body", b""))
        return message

    def _count(self, length: int) -> None:
        self._taken += length
        if self._taken > self._max_bytes:
            raise BodyTooLarge(f"the body is longer than {self._max_bytes} bytes; raise --max-body, or send less")


class Unpacking:
    """One body's decompression. Raises InvalidRequest for bytes that are not in the encoding's form."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._inflate: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What more of the packed body holds, in pieces."""
        piece = b""
        while data or len(piece) == _PIECE:  # a full piece may have left more behind
            inflate = self._member(data)
            try:
                piece = inflate.decompress(data, _PIECE)
            except zlib.error as error:
                raise self._broken(str(error)) from None
            data = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
            if piece:
                yield piece

    def finish(self) -> None:
        """The packed body has ended."""
        if self._inflate is not None and not self._inflate.eof:
            raise self._broken("it ends in the middle")

    def _member(self, data: bytes) -> zlib._Decompress:
        """What unpacks these bytes: a gzip body may have several members."""
        if self._inflate is None or (self._inflate.eof and data and self._encoding == "gzip"):
            form = _GZIP if self._encoding == "gzip" else _ZLIB if data[0] & 0x0F == 8 else _RAW
            self._inflate = zlib.decompressobj(form)
        elif self._inflate.eof and data:
            raise self._broken("bytes follow its end")
        return self._inflate

    def _broken(self, reason: str) -> InvalidRequest:
        return InvalidRequest(f"the body is not {self._encoding}, as its Content-Encoding says: {reason}")
