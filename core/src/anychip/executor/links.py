"""Where the engine's sockets are, and how workers find them: in a private folder, or on a network, behind a key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import zmq

from anychip.keyed_sockets import ClusterKey, KeyedContext, Socket


class Links(Protocol):
    """Binds the engine's sockets. They are its own until `close`."""

    zmq: zmq.Context[Any]

    def bind(self, kind: int, name: str) -> tuple[Socket, str]:
        """A bound socket, and the endpoint that a worker connects to. Names differ."""
        ...

    def close(self) -> None: ...


class FolderLinks:
    """Unix sockets in a folder that only this user can enter, so nobody else reaches them."""

    def __init__(self, folder: Path) -> None:
        self.zmq: zmq.Context[Any] = zmq.Context()
        self._folder = folder

    def bind(self, kind: int, name: str) -> tuple[Socket, str]:
        socket, endpoint = self.zmq.socket(kind), f"ipc://{self._folder}/{name}"
        socket.bind(endpoint)
        return socket, endpoint

    def close(self) -> None:
        self.zmq.destroy(linger=0)


class KeyedLinks:
    """TCP sockets that ask for a key. The context is another's."""

    def __init__(self, context: KeyedContext, key: ClusterKey) -> None:
        self.zmq = context.zmq
        self._context = context
        self._key = key

    def bind(self, kind: int, name: str) -> tuple[Socket, str]:
        return self._context.bind(kind, self._key)

    def close(self) -> None:
        """Whoever owns the context closes it."""
