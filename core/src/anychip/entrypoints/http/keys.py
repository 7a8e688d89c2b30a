"""API keys: who a request is from, and how many of theirs run. Keys are compared by hash, in constant time."""

from __future__ import annotations

import hmac
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from anychip.errors import ConfigError, QueueFull

NOBODY = ""
"""The tenant of a server that asks for no key."""


def hashed(key: str) -> str:
    """Keys are long and random, so one round of a fast hash is enough."""
    return sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    """A key of 256 random bits."""
    return f"ak-{secrets.token_urlsafe(32)}"


class Keys:
    """Without keys everybody may enter. `concurrency`: requests that one key may have open at once."""

    def __init__(self, hashes: dict[str, str], *, concurrency: int | None = None) -> None:
        self._hashes = hashes  # name -> hash
        self._concurrency = concurrency
        self._open: Counter[str] = Counter()

    @classmethod
    def of(cls, api_key: str | None, file: str | None, concurrency: int | None) -> Keys:
        """A key by itself, a file of `name:sha256` lines, or both; ServerConfig has refused an empty key. Raises
        ConfigError for a file that has others."""
        hashes = {} if api_key is None else {"default": hashed(api_key)}
        if file is not None:
            hashes |= _read(file)
            if not hashes:
                raise ConfigError(f"{file} holds no key; `anychip hash-key NAME` makes one")
        return cls(hashes, concurrency=concurrency)

    def tenant(self, given: str | None) -> str | None:
        """Whose key it is; None: nobody's. Every key is compared, whichever fits."""
        if not self._hashes:
            return NOBODY
        digest, found = hashed(given or ""), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    @contextmanager
    def holding(self, tenant: str) -> Iterator[None]:
        """Counts a request of a tenant while it is open. Raises QueueFull."""
        if self._concurrency is not None and self._open[tenant] >= self._concurrency:
            raise QueueFull(
                f"{self._open[tenant]} requests of this key are open, at most {self._concurrency} may be", retry_after=1
            )
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


def given_key(headers: Mapping[bytes, bytes]) -> str | None:
    """The key that a request brings, as OpenAI's clients send it or as Anthropic's do."""
    bearer = headers.get(b"authorization", b"")
    if bearer[:7].lower() == b"bearer ":
        return bearer[7:].strip().decode("utf-8", "surrogateescape")
    given = headers.get(b"x-api-key")
    return None if given is None else given.strip().decode("utf-8", "surrogateescape")


def _read(file: str) -> dict[str, str]:
    try:
        lines = [line.strip() for line in Path(file).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys {file} cannot be read: {error}") from error
    hashes: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        name, colon, digest = line.rpartition(":")
        if not colon or not name or len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
            raise ConfigError(f"{file}:{number} is not NAME:SHA256; `anychip hash-key NAME` writes such a line")
        if digest.lower() == hashed(""):
            raise ConfigError(f"{file}:{number} is the hash of an empty key, which everybody has; make another key")
        if name in hashes:
            raise ConfigError(f"{file}:{number} names {name!r} again")
        hashes[name] = digest.lower()
    return hashes
