"""Serves the application: binds the port first, starts the engine, says what was started, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import time
from collections.abc import Callable

import uvicorn

from anychip.config import EngineConfig
from anychip.entrypoints.openai.app import make_app
from anychip.errors import PortInUse
from anychip.launch.async_llm import AsyncLLM
from anychip.messages import WorkerReady

_DRAIN_S = 30
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    config: EngineConfig,
    *,
    host: str,
    port: int,
    api_key: str | None,
    announce: Callable[[AsyncLLM, WorkerReady, str, float], None],
) -> None:
    """Runs until a signal. Raises UserError for what the user can mend, before or after the engine's start."""
    listener = bind(host, port)
    try:
        asyncio.run(_serve(config, listener, api_key, announce))
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortInUse before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} of {host} is in use; choose another with --port") from error
        raise PortInUse(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


async def _serve(
    config: EngineConfig,
    listener: socket.socket,
    api_key: str | None,
    announce: Callable[[AsyncLLM, WorkerReady, str, float], None],
) -> None:
    began = time.perf_counter()
    llm = AsyncLLM(config)
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None
    # Until uvicorn installs its own handlers, a signal ends the start.
    for number in _SIGNALS:
        loop.add_signal_handler(number, main.cancel)
    try:
        worker = await llm.start()
        host, port = listener.getsockname()[:2]
        settings = uvicorn.Config(
            make_app(llm, api_key=api_key),
            log_level="warning",
            timeout_graceful_shutdown=_DRAIN_S,
            lifespan="off",
        )
        server = uvicorn.Server(settings)
        # uvicorn handles signals while it serves, and raises them again when it is done: closing must not be
        # cancelled by that.
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        announce(
            llm,
            worker,
            f"http://{'localhost' if host == '0.0.0.0' else host}:{port}",
            time.perf_counter() - began,
        )
        await server.serve(sockets=[listener])
    except asyncio.CancelledError:
        pass
    finally:
        await llm.close()
