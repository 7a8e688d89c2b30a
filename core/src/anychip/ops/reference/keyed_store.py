"""A store of torch's in which ranks of several hosts meet: it asks the engine, by a socket with the cluster's key."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec
import torch.distributed
import zmq

from anychip.keyed_sockets import ClusterKey

_ANSWER_MS = 30_000
_PAUSE_S = 0.01

_Store: Any = torch.distributed.Store  # type: ignore[attr-defined]
"""From C++, without types."""


class KeyedStore(_Store):  # type: ignore[misc]
    """`address` is the store's, as host:port. Methods are as torch.distributed.Store has them; values are bytes."""

    def __init__(self, address: str, key: ClusterKey, timeout: timedelta) -> None:
        super().__init__()
        self.set_timeout(timedelta(seconds=timeout.total_seconds()))
        self._timeout = timeout
        self._asking = threading.Lock()  # runtimes ask from threads of their own
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, _ANSWER_MS)
        key.use(self._socket)
        self._socket.connect(f"tcp://{address}")

    def set(self, name: str, value: bytes) -> None:
        self._ask("set", name, bytes(value))

    def get(self, name: str) -> bytes:
        """Waits for the value."""
        self.wait([name])
        value = self._ask("get", name)
        assert value is not None, f"{name} was there and is gone"
        return value

    def add(self, name: str, amount: int) -> int:
        return int(self._ask("add", name, str(amount).encode()) or b"0")

    def check(self, names: Sequence[str]) -> bool:
        return all(self._ask("get", name) is not None for name in names)

    def delete_key(self, name: str) -> bool:
        return self._ask("delete", name) is not None

    def wait(self, names: Sequence[str], timeout: timedelta | None = None) -> None:
        """Raises RuntimeError, as torch's stores do, when a value does not come."""
        limit_s = (timeout or self._timeout).total_seconds()
        deadline = time.monotonic() + limit_s
        for name in names:
            while self._ask("get", name) is None:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"a rank has not come within {limit_s:.0f} s: nobody has set {name}")
                time.sleep(_PAUSE_S)

    def _ask(self, operation: str, name: str, value: bytes = b"") -> bytes | None:
        with self._asking:
            try:
                self._socket.send(msgspec.msgpack.encode((operation, name, value)))
                return msgspec.msgpack.decode(self._socket.recv(), type=bytes | None)
            except zmq.Again as error:
                raise RuntimeError(
                    f"the engine does not answer for {_ANSWER_MS // 1000} s, where ranks meet"
                ) from error
