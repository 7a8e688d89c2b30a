"""Threads in which prompts become requests, so that the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE = 256
"""Characters or ids up to which handing the work over would take longer than the work: about 0.1 ms of tokenizing."""
_LONG = 32_768
_THREADS = 2


class InputThreads:
    """Long prompts have a thread of their own, and take their turns there: a short one never waits for them. The work
    should leave the interpreter to others for most of its time, as tokenizing does."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(_THREADS, thread_name_prefix="input")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="long-input")

    async def run(self, size: int, work: Callable[..., T], *arguments: object) -> T:
        """work(*arguments), whose time grows with `size`: characters of text, or ids. Raises what the work raises."""
        if size <= INLINE:
            return work(*arguments)
        threads = self._short if size <= _LONG else self._long
        return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)

    def close(self) -> None:
        """What has not begun is cancelled."""
        for threads in (self._short, self._long):
            threads.shutdown(wait=False, cancel_futures=True)
