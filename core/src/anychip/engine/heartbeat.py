"""Says every half second that the engine process runs and how far it is, from a thread and a socket of its own: a long
step, or a start, is not silence."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from anychip.engine.engine_core import EngineCore
from anychip.engine.ipc import encoder, output_endpoint
from anychip.executor.progress import Progress
from anychip.messages import Heartbeat

_EVERY_S = 0.5


class StallClock:
    """Measures how long a number has not grown. Time in which this process was stopped does not count, as nothing can
    get on in it: of the time between two looks, `longest_s` counts at most."""

    def __init__(self, *, longest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_s = longest_s
        self._clock = clock
        self._looked_at = clock()
        self._count = -1
        self._stalled_s = 0.0

    def look(self, count: int) -> float:
        """Seconds for which `count` has been what it is."""
        now = self._clock()
        passed, self._looked_at = min(self._longest_s, now - self._looked_at), now
        self._stalled_s = self._stalled_s + passed if count == self._count else 0.0
        self._count = count
        return self._stalled_s


class HeartbeatThread:
    """Runs from `start` until `stop`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, progress: Progress) -> None:
        self._core: EngineCore | None = None
        self._context = context
        self._endpoint = output_endpoint(folder)
        self._progress = progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def first_beat_of(self, core: EngineCore) -> Heartbeat:
        """The engine is built: from now on its statistics are told. The caller sends this beat, ahead of whatever
        brings requests. An engine that stops before the thread's next beat would otherwise be given the time of a
        start."""
        self._core = core
        return self._beat(0.0)

    def _run(self) -> None:
        stalled = StallClock(longest_s=2 * _EVERY_S)
        with self._context.socket(zmq.PUSH) as socket:  # sockets are their thread's own
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._endpoint)
            while True:
                beat = self._beat(stalled.look(self._progress.count))
                with contextlib.suppress(zmq.Again):  # nobody has read the last thousand
                    socket.send(encoder.encode(beat), zmq.NOBLOCK)
                if self._ended.wait(_EVERY_S):
                    return

    def _beat(self, busy_s: float) -> Heartbeat:
        progress, core = self._progress, self._core
        return Heartbeat(
            doing=progress.doing,
            busy_s=busy_s,
            limit_s=progress.limit_s,
            worker_pids=progress.pids,
            stats=None if core is None else core.scheduler.stats,
        )
