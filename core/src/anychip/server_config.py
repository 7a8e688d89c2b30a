"""Every setting of the HTTP server, validated when it is made and frozen afterwards. The engine's are in config.py."""

from __future__ import annotations

import msgspec

from anychip.errors import ConfigError


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine is served over HTTP. Raises ConfigError at construction."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    """A Unix socket instead of host and port."""
    tls_cert: str | None = None
    tls_key: str | None = None
    api_key: str | None = None
    api_keys: str | None = None
    """A file of hashed keys, as `anychip hash-key` writes them."""
    key_concurrency: int | None = None
    """Requests that one key may have open at once."""
    admin_port: int | None = None
    admin_key: str | None = None
    adapter_folder: str | None = None
    """Where adapters may be loaded from while the server runs; None: from nowhere."""
    cors_origins: tuple[str, ...] = ()
    ui: bool = True
    lenient: bool = False
    max_body_bytes: int = 8 * 2**20
    request_timeout_s: float | None = None
    """The longest that a request may take; one may ask for less."""
    ready_within_s: float = 10.0
    """Without forward progress for so long, the server is not ready."""
    drain_s: float = 30.0
    restarts: int = 5
    """Of a dead engine, within ten minutes."""
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    otel_endpoint: str | None = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS takes both --tls-cert and --tls-key")
        for name in ("api_key", "admin_key"):
            _check_key(name, getattr(self, name))
        if self.admin_port is not None and self.admin_key is None:
            raise ConfigError("--admin-port takes an --admin-key: whoever reaches the port could stop the server")
        if self.adapter_folder is not None and self.admin_port is None:
            raise ConfigError("--adapter-folder is read by the admin port alone; give an --admin-port, or leave it out")
        if self.key_concurrency is not None and self.key_concurrency < 1:
            raise ConfigError(f"key_concurrency is {self.key_concurrency}; expected 1 or more")


def _check_key(name: str, key: str | None) -> None:
    """A secret that is unset where it should be set must not open the server."""
    remedy = f"give --{name.replace('_', '-')} or ANYCHIP_{name.upper()} a key, or leave both out"
    if key is not None and not key.strip():
        raise ConfigError(f"{name} is empty; {remedy}")
    if key is not None and key != key.strip():
        raise ConfigError(f"{name} begins or ends with white space, which no client can send; {remedy}")
