"""A proposer may be a stranger's code, on the engine's thread: what it does amiss costs drafts, and no tokens. Does not
know drafts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from anychip.drafts import Speculation
from anychip.request import Request

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

log = logging.getLogger("anychip.engine")

MISTAKES = (Exception, SystemExit)
"""What a stranger's code may raise without harm to the engine."""

_LIMIT_S = 1.0
"""Seconds that one call may take. Nothing interrupts it, and every sequence waits meanwhile."""

_MOST_LATE = 3
"""Calls beyond the limit after which an engine asks its proposer no more."""


class Guard:
    """Around every call of one engine's proposer. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_failures = 0
        self.clock = clock
        self._num_late = 0

    @property
    def gave_up(self) -> bool:
        """Whether the proposer is not asked any more, for any sequence."""
        return self._num_late >= _MOST_LATE

    @property
    def limit_s(self) -> float:
        """Seconds that one call may take."""
        return _LIMIT_S

    def ask(
        self, request: Request, call: Callable[Given, Answer], *given: Given.args, **named: Given.kwargs
    ) -> Answer | None:
        """What the call returns. None where it raised, where it took too long, and where the proposer is not asked any
        more: the request then goes on without its drafts."""
        if self.gave_up:
            goes_on_without(request)
            return None
        began = self.clock()
        answer, error = None, None
        try:
            answer = call(*given, **named)
        except MISTAKES as raised:
            error = raised
        took = self.clock() - began
        if error is None and took <= self.limit_s:
            return answer
        self.failed(request, error, took)
        return None

    def failed(self, request: Request, error: BaseException | None, took: float) -> None:
        """A call for the request raised the error, or took too long: so many seconds."""
        failure = f"the proposer raised {type(error).__name__}: {error}"
        if took > self.limit_s:
            self._num_late += 1
            if error is None:
                failure = f"a call of the proposer took {took:.1f} seconds, {self.limit_s:g} at most"
        goes_on_without(request)
        self.num_failures += 1
        if self.num_failures == 1:
            log.warning("request %s goes on without drafts: %s", request.request_id, failure, exc_info=error)
        else:  # as many lines as there are requests, and one traceback
            log.warning(
                "request %s goes on without drafts: %s (failure %d)", request.request_id, failure, self.num_failures
            )
        if self.gave_up:
            log.error("%d calls of the proposer took too long: it is not asked any more", self._num_late)


def goes_on_without(request: Request) -> None:
    """Nobody drafts for the request any more, but for what a grammar of its own forces."""
    request.speculation = Speculation(None) if request.processors else None
