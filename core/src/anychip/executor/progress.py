"""How far an engine is, and how long its next piece of work may take. The engine's thread writes it, and the thread
that sends heartbeats reads it. Does not judge: whoever started the process that may hang does."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from anychip.step_messages import AnyDecision

_FLOOR_S = 30.0
"""The least that a step may take: a busy machine is not a hang."""

_FIRST_S = 300.0
"""What the first step of a size may take beyond what others took: its shape may be compiled or captured on the way."""

_MULTIPLE = 10.0
"""How many times the slowest recent step of its size a step may take."""

_KEPT = 0.99
"""The share of the slowest time that is kept from a step to the next, so that old times count less."""


@dataclass(frozen=True, slots=True)
class _Flying:
    step_id: int
    num_rows: int
    num_tokens: int
    since: float

    @property
    def size(self) -> int:
        """Sizes that share a power of two are similar."""
        return self.num_tokens.bit_length()


class Progress:
    """`step_timeout_s` None: a step's limit comes from the times of the steps before it."""

    def __init__(
        self,
        *,
        start_timeout_s: float = 600.0,
        step_timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.count = 0
        """Grows whenever the engine has got on."""
        self.pids: tuple[int, ...] = ()
        """Of the workers' processes."""
        self._start_timeout_s = start_timeout_s
        self._step_timeout_s = step_timeout_s
        self._clock = clock
        self._starting: str | None = "start"
        self._flying: deque[_Flying] = deque()
        self._slowest: dict[int, float] = {}  # seconds, by size

    # -- what the engine's thread says --------------------------------------------------------------------

    def start_got_on(self, doing: str) -> None:
        """A piece of the start is done, and `doing` begins or goes on."""
        self._starting = doing
        self.count += 1

    def started(self) -> None:
        """From now on there are steps."""
        self._starting = None
        self.count += 1

    def turned(self) -> None:
        """The engine's loop begins a turn."""
        self.count += 1

    def launching(self, decision: AnyDecision) -> None:
        """A step is about to be launched."""
        counts = memoryview(decision.num_tokens).cast("i")
        self._flying.append(_Flying(decision.step_id, len(counts), sum(counts), self._clock()))
        self.count += 1

    def given_up(self) -> None:
        """The step that was launched last will not be collected."""
        self._flying.pop()
        self.count += 1

    def collected(self, *, done: bool = True) -> None:
        """The oldest step has come back, or (`done` False) failed: its time then says nothing."""
        step = self._flying.popleft()
        self.count += 1
        if done:
            took, slowest = self._clock() - step.since, self._slowest.get(step.size, 0.0)
            self._slowest[step.size] = max(took, slowest * _KEPT)

    # -- what others read ---------------------------------------------------------------------------------

    @property
    def doing(self) -> str:
        """For people: the start's piece, or the oldest step."""
        if self._starting is not None:
            return self._starting
        for step in tuple(self._flying):
            return f"step {step.step_id} of {step.num_rows} sequences and {step.num_tokens} tokens"
        return "the loop, between steps"

    @property
    def limit_s(self) -> float:
        """Seconds that may pass until `count` grows."""
        if self._starting is not None:
            return self._start_timeout_s
        if self._step_timeout_s is not None:
            return self._step_timeout_s
        return max((self._step_limit_s(step) for step in tuple(self._flying)), default=_FLOOR_S)

    def _step_limit_s(self, step: _Flying) -> float:
        known = self._slowest.get(step.size)
        if known is not None:
            return max(_FLOOR_S, _MULTIPLE * known)
        # A smaller step's time, scaled up, bounds that of a larger one.
        guesses = (seconds * 2 ** max(0, step.size - size) for size, seconds in tuple(self._slowest.items()))
        return _FIRST_S + _MULTIPLE * max(guesses, default=0.0)
