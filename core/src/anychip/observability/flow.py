"""How fast requests get through the queue: what a wait will be, and when to come again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_HALF_LIFE_S = 10.0
"""Of busy time: older service counts less."""

_LONGEST_RETRY_S = 60


class Flow:
    """Counts the requests that wait for their first token, and how long one takes to get there while others wait.
    Idle time does not count: the rate is the engine's, not the clients'."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.waiting = 0
        self._since = 0.0  # when the busy time that is not counted yet began
        self._busy_s = 0.0
        self._served = 0.0

    def enter(self) -> None:
        """A request waits."""
        if not self.waiting:
            self._since = self._clock()
        self.waiting += 1

    def leave(self, *, served: bool) -> None:
        """A request has its first token, or (`served` False) ended without one."""
        now = self._clock()
        self.waiting -= 1
        passed, self._since = now - self._since, now
        kept = 0.5 ** (passed / _HALF_LIFE_S)
        self._busy_s = self._busy_s * kept + passed
        self._served = self._served * kept + served

    def wait_s(self, ahead: int) -> float | None:
        """How long a request waits behind so many others; None before anything is known."""
        return self._busy_s / self._served * ahead if self._served >= 1 else None

    def admits(self, max_wait_s: float | None) -> bool:
        """Whether a request that came now would wait no longer than that; None: however long."""
        wait = None if max_wait_s is None else self.wait_s(self.waiting + 1)
        return wait is None or max_wait_s is None or wait <= max_wait_s

    def retry_after_s(self) -> int:
        """Whole seconds after which half of what waits now will be gone."""
        wait = self.wait_s(self.waiting // 2 + 1)
        return max(1, min(_LONGEST_RETRY_S, math.ceil(wait if wait is not None else 1)))
