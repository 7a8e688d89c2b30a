"""One engine process with its sockets and their folder, from its start to the end of what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from anychip.config import EngineConfig
from anychip.engine.async_engine import AsyncEngine
from anychip.errors import AnychipError, EngineDead
from anychip.launch.child import Child, kill_leftover, runs, show_stack
from anychip.launch.folder import private_folder
from anychip.launch.watchdog import Watchdog
from anychip.process_specs import EngineSpec

_WATCH_INTERVAL_S = 0.1
_STACK_S = 0.2
"""What a process has to write its stacks in: one that cannot is not waited for."""

_WORKERS_S = 1.0
"""What workers have to follow their engine in."""


class EngineProcess:
    """`engine` is what this process is to the API process."""

    def __init__(self, config: EngineConfig, folder: TemporaryDirectory[str]) -> None:
        self._folder = folder
        self._watchdog = Watchdog(start_timeout_s=config.start_timeout_s)
        self.engine = AsyncEngine(Path(folder.name), self._watchdog.heard)
        self.engine.bind()
        self._child: Child | None = None
        self._death: asyncio.Task[None] | None = None

    @classmethod
    async def begin(cls, config: EngineConfig) -> EngineProcess:
        """Starts it. Raises what keeps a process from being started, such as OSError, with nothing left behind."""
        process = cls(config, private_folder())
        try:
            spec = EngineSpec(config=config, folder=process._folder.name)
            process._child = Child("anychip.launch.engine_main", spec)
        except BaseException:
            await process.end(0.0)
            raise
        process._death = asyncio.create_task(process._watch(process._child))
        return process

    async def ended(self) -> AnychipError:
        """Waits until there is no engine to talk to; its requests have failed then. Its process may still live."""
        assert self._death is not None, "begin first"
        await self._death
        assert self.engine.dead is not None
        return self.engine.dead

    async def end(self, drain_s: float) -> None:
        """Ends the process, which has `drain_s` to do so by itself, and its workers."""
        if self._death is not None:
            self._death.cancel()
        await self.engine.close()
        if self._child is not None:
            # An engine that is still starting does not read messages.
            await asyncio.to_thread(self._child.stop, drain_s if self.engine.is_ready else 0.0)
        await self._end_workers()
        self._folder.cleanup()

    def kill(self, why: str) -> None:
        """Ends it at once."""
        self.engine.fail(EngineDead(f"the engine was ended: {why}"))
        if self._child is not None:
            self._child.kill()

    async def _watch(self, child: Child) -> None:
        """Until the engine is dead, or hangs and is killed."""
        while (code := child.exit_code()) is None:
            if self.engine.dead is not None:
                return
            hung = self._watchdog.look()
            if hung is not None:
                self.engine.fail(hung)
                await self._kill_hung(child)
                return
            await asyncio.sleep(_WATCH_INTERVAL_S)
        # Its last message may still be on the way, and says more than the status.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(_WATCH_INTERVAL_S)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        self.engine.fail(EngineDead(f"the engine process {how}; its log says more"))

    async def _kill_hung(self, child: Child) -> None:
        for pid in (child.pid, *self._watchdog.worker_pids):
            show_stack(pid)
            await asyncio.sleep(_STACK_S)
        child.kill()
        for pid in self._watchdog.worker_pids:
            kill_leftover(pid)

    async def _end_workers(self) -> None:
        """Workers notice by themselves that their engine is gone, unless they hang. The next one needs their memory."""
        pids, deadline = self._watchdog.worker_pids, time.monotonic() + _WORKERS_S
        while any(map(runs, pids)) and time.monotonic() < deadline:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        for pid in pids:
            kill_leftover(pid)
