"""Sockets between hosts. Who has the cluster's key may connect; nobody else can connect, or read what is sent.

ZeroMQ's CURVE encrypts and signs. Both sides' key pairs come from one secret, so the secret is all that hosts share.
Does not know what is sent.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from anychip.errors import ConfigError

_LEAST = 32
"""Characters of a key: who records a connection may try keys at leisure."""

Socket = zmq.Socket[bytes]


class ClusterKey:
    """`text` is the secret, which every host has."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._engine, self._worker = _pair(text, b"engine"), _pair(text, b"worker")

    @classmethod
    def of_file(cls, path: str) -> ClusterKey:
        """Raises ConfigError for a file that has none, or one that could be guessed."""
        remedy = "make one with `openssl rand -hex 32`, and give every host the same"
        try:
            text = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the cluster's key cannot be read from {path}: {error}; {remedy}") from error
        if len(text) < _LEAST:
            raise ConfigError(f"the cluster's key in {path} has {len(text)} characters, {_LEAST} are needed; {remedy}")
        return cls(text)

    @classmethod
    def new(cls) -> ClusterKey:
        """A key of 256 random bits."""
        return cls(secrets.token_hex(32))

    def of_session(self, session: str) -> ClusterKey:
        """For the sockets of one engine's life: what was started for the one before cannot speak to the next."""
        return ClusterKey(hmac.digest(self.text.encode(), session.encode(), "sha256").hex())

    @property
    def workers_public(self) -> bytes:
        """By which the engine knows a worker's side."""
        return self._worker[0]

    def offer(self, socket: Socket) -> None:
        """Before `bind`: the socket is the engine's."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._engine

    def use(self, socket: Socket) -> None:
        """Before `connect`: the socket is a worker's, and talks to nobody but the engine."""
        socket.curve_serverkey = self._engine[0]
        socket.curve_publickey, socket.curve_secretkey = self._worker


class KeyedContext:
    """A context whose bound sockets let in whoever has their key, on one address of this host."""

    def __init__(self, address: str) -> None:
        self.zmq: zmq.Context[Any] = zmq.Context()
        self._known: set[bytes] = set()
        self._address = f"[{address}]" if ":" in address else address
        self._authenticator = ThreadAuthenticator(self.zmq)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """zmq.auth's question: whether a peer with this public key may enter."""
        return key in self._known

    def bind(self, kind: int, key: ClusterKey, port: int | None = None) -> tuple[Socket, str]:
        """A socket and where it is found; None: a free port. Raises ConfigError where it cannot listen."""
        socket = self.zmq.socket(kind)
        socket.setsockopt(zmq.IPV6, ":" in self._address)
        self._known.add(key.workers_public)
        key.offer(socket)
        place = f"tcp://{self._address}:{'*' if port is None else port}"
        try:
            socket.bind(place)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(
                f"cannot listen on {place}: {error}; give an address of this host and a free port"
            ) from error
        return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        self._authenticator.stop()
        self.zmq.destroy(linger=0)


def _pair(text: str, role: bytes) -> tuple[bytes, bytes]:
    """The public and the secret key of a role."""
    secret = z85.encode(hashlib.blake2b(text.encode(), digest_size=32, person=b"anychip-" + role).digest())
    return zmq.curve_public(secret), secret
