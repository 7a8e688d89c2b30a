"""Connections that cost a client nothing to keep are not kept: a request's head that trickles, an answer that nobody
takes. Between requests uvicorn's own limit holds, and Incoming's for bodies."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0
"""From the connection, or from the first byte of its next request, to the end of the head."""

UNREAD_S = 120.0
"""How long a client may leave an answer untaken once the buffers are full."""


class Connection(H11Protocol):
    """h11 also bounds the length of a request's head, 64 KiB, whatever else is installed."""

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_S, self._drop)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not waits and self._head is not None:
            self._head.cancel()
            self._head = None
        elif waits and self._head is None:
            self._head = self.loop.call_later(HEAD_S, self._drop)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_S, self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._unread):
            if timer is not None:
                timer.cancel()

    def _drop(self) -> None:
        """At once: what is unsent would wait for the client as well. The application sees a disconnect."""
        self.transport.abort()
