"""Tells a hang from a long step or a slow start, by the heartbeats of the engine's process. Does not end anything."""

from __future__ import annotations

import time
from collections.abc import Callable

from anychip.engine.heartbeat import StallClock
from anychip.errors import EngineHung
from anychip.messages import Heartbeat

_LONGEST_S = 1.0
"""A longer pause between two looks was this process's own, and counts no more."""

_GRACE_S = 1.5
"""The engine's process judges its workers first: it knows more of them."""


class Watchdog:
    """Heartbeats say for how long there has been no progress, and how long there may be none. A process that is
    stopped, or in which no thread can run, sends none: its silence is added to what it said last."""

    def __init__(self, *, start_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._beat = Heartbeat("start of its process", 0.0, start_timeout_s)
        self._num_beats = 0
        self._silence = StallClock(longest_s=_LONGEST_S, clock=clock)

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """As the engine's process said last."""
        return self._beat.worker_pids

    def heard(self, beat: Heartbeat) -> None:
        if beat.stats is None and self._beat.stats is not None:
            return  # a beat of the start that was overtaken: its limit is not a step's
        self._beat = beat
        self._num_beats += 1

    def look(self) -> EngineHung | None:
        """What there is to say if the engine hangs. Called many times a second."""
        beat, silent_s = self._beat, self._silence.look(self._num_beats)
        stalled_s = beat.busy_s + silent_s
        if stalled_s <= beat.limit_s + _GRACE_S:
            return None
        option = "--start-timeout-s" if beat.stats is None else "--step-timeout-s"
        silence = f", the last {silent_s:.0f} s without a sign of life" if silent_s > _LONGEST_S else ""
        return EngineHung(
            f"the engine made no progress for {stalled_s:.0f} s{silence}, {beat.limit_s:.0f} s may pass: {beat.doing}; "
            f"the log has the stacks of its processes; raise {option} if that may take so long"
        )
