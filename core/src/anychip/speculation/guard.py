"""A proposer may be a stranger's code, on the engine's thread: what it does amiss costs drafts, and no tokens. Does not
know drafts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from anychip.request import Request

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

log = logging.getLogger("anychip.engine")

_LIMIT_S = 1.0
"""Seconds that one call may take. Nothing interrupts it, and every sequence waits meanwhile."""

_MOST_LATE = 3
"""Calls beyond the limit after which an engine asks its proposer no more."""


class Guard:
    """Around every call of one engine's proposer. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_failures = 0
        self._num_late = 0
        self._clock = clock

    @property
    def gave_up(self) -> bool:
        """Whether the proposer is not asked any more, for any sequence."""
        return self._num_late >= _MOST_LATE

    def ask(
        self, request: Request, call: Callable[Given, Answer], *given: Given.args, **named: Given.kwargs
    ) -> Answer | None:
        """What the call returns. None where it raised, where it took too long, and where the proposer is not asked any
        more: the request then goes on without drafts."""
        if self.gave_up:
            request.speculation = None
            return None
        began = self._clock()
        answer, failure, error = None, "", None
        try:
            answer = call(*given, **named)
        except (Exception, SystemExit) as raised:  # noqa: BLE001 - a stranger's code
            error = raised
            failure = f"the proposer raised {type(error).__name__}: {error}"
        took = self._clock() - began
        if took > _LIMIT_S:
            self._num_late += 1
            failure = failure or f"a call of the proposer took {took:.1f} seconds, {_LIMIT_S:g} at most"
        if not failure:
            return answer
        request.speculation = None
        self.num_failures += 1
        log.warning("request %s goes on without drafts: %s", request.request_id, failure, exc_info=error)
        if self.gave_up:
            log.error("%d calls of the proposer took too long: it is not asked any more", self._num_late)
        return None
