"""Serves the application: binds first, starts the engine, says what was started, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import math
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from anychip.config import EngineConfig
from anychip.entrypoints.http.admin import make_admin_app
from anychip.entrypoints.http.app import make_app
from anychip.entrypoints.http.connection import Connection
from anychip.errors import ConfigError, PortInUse
from anychip.launch.async_llm import AsyncLLM
from anychip.server_config import ServerConfig
from anychip.worker_report import WorkerReady

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048
_LAST_WORDS_S = 5
"""After the drain: for the errors that end what is left."""

CLOSING_S = _LAST_WORDS_S + 20.0
"""What a server may take to end, behind its drain: the last words, and its processes."""

Announce = Callable[[AsyncLLM, WorkerReady, str, float], None]


def serve(config: EngineConfig, server: ServerConfig, *, announce: Announce) -> None:
    """Runs until a signal. Raises UserError for what the user can mend, before or after the engine's start."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listening(server))
        admin = None
        if server.admin_port is not None:
            admin = stack.enter_context(contextlib.closing(bind(server.host, server.admin_port)))
        asyncio.run(_Server(config, server, listener, admin).run(announce))


def steady_interpreter() -> None:
    """For a process whose event loop must not stand still. What is loaded by now stays: the garbage collector need not
    look at it each time, which takes tens of milliseconds. A thread that computes gives way after a millisecond, not
    five."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.001)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortInUse before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} of {host} is in use; choose another with --port") from error
        raise PortInUse(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


@contextlib.contextmanager
def _listening(server: ServerConfig) -> Iterator[socket.socket]:
    if server.uds is None:
        with contextlib.closing(bind(server.host, server.port)) as listener:
            yield listener
        return
    path = Path(server.uds)
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError(f"--uds {path} is there and is no socket")
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        with contextlib.suppress(FileNotFoundError):
            _check_unused(path)
            path.unlink()
        try:
            old_mask = os.umask(0o077)  # its owner alone may connect
            try:
                listener.bind(str(path))
            finally:
                os.umask(old_mask)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise PortInUse(f"cannot listen on {path}: {error.strerror}") from error
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _check_unused(path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:  # left behind by a server that was killed
            return
        except PermissionError as error:
            raise PortInUse(f"{path} is another user's socket; choose another with --uds") from error
    raise PortInUse(f"another server listens on {path}")


class _DrainingServer(uvicorn.Server):
    """Shuts down in two steps: requests in flight have `drain_s` to end by themselves, then they are ended with an
    error. `on_limit` ends them."""

    def __init__(self, config: uvicorn.Config, *, drain_s: float, on_limit: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self._on_limit = on_limit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        limit = asyncio.create_task(self._end_late())
        try:
            await super().shutdown(sockets)
        finally:
            limit.cancel()

    async def _end_late(self) -> None:
        await asyncio.sleep(self._drain_s)
        await self._on_limit()


class _Server:
    def __init__(
        self, config: EngineConfig, server: ServerConfig, listener: socket.socket, admin: socket.socket | None
    ) -> None:
        self.config = server
        self.listener = listener
        self.admin = admin
        self.llm = AsyncLLM(config, restarts=server.restarts, otel_endpoint=server.otel_endpoint)
        self.public: uvicorn.Server | None = None

    async def run(self, announce: Announce) -> None:
        began = time.perf_counter()
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        # Until uvicorn installs its own handlers, a signal ends the start.
        for number in _SIGNALS:
            loop.add_signal_handler(number, main.cancel)
        try:
            worker = await self.llm.start()
            settings = self._settings(make_app(self.llm, self.config))
            steady_interpreter()
            self.public = _DrainingServer(settings, drain_s=self.config.drain_s, on_limit=self.llm.abort_all)
            # uvicorn handles signals while it serves, and raises them again when it is done: closing must not be
            # cancelled by that.
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
            announce(self.llm, worker, self._url(), time.perf_counter() - began)
            await self._serve_both(self.public)
        except asyncio.CancelledError:
            pass
        finally:
            await self.llm.close()

    async def _serve_both(self, public: uvicorn.Server) -> None:
        admin_server: uvicorn.Server | None = None
        beside: asyncio.Task[None] | None = None
        if self.admin is not None:
            admin_server = uvicorn.Server(self._settings(make_admin_app(self.llm, self.config, self.stop)))
            # `serve` would take the signals, which are the public server's.
            beside = asyncio.create_task(admin_server._serve([self.admin]))
        try:
            await public.serve(sockets=[self.listener])
        finally:
            if admin_server is not None and beside is not None:
                admin_server.should_exit = True
                await beside

    def stop(self) -> None:
        """As SIGTERM does: requests in flight end, new ones find no listener."""
        if self.public is not None:
            self.public.should_exit = True

    def _settings(self, app: ASGIApp) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=math.ceil(self.config.drain_s) + _LAST_WORDS_S,
            timeout_keep_alive=30,
            lifespan="off",
            server_header=False,
            ssl_certfile=self.config.tls_cert,
            ssl_keyfile=self.config.tls_key,
        )

    def _url(self) -> str:
        if self.config.uds is not None:
            return f"unix:{self.config.uds}"
        host, port = self.listener.getsockname()[:2]
        scheme = "http" if self.config.tls_cert is None else "https"
        return f"{scheme}://{'localhost' if host == '0.0.0.0' else host}:{port}"
