"""Prompts are worked on beside the event loop, and short ones never wait for long ones."""

from __future__ import annotations

import asyncio
import threading

from anychip.engine.input_threads import INLINE, InputThreads


def test_a_short_prompt_does_not_wait_for_long_ones():
    async def run() -> None:
        threads, go = InputThreads(), threading.Event()
        try:
            long = [asyncio.create_task(threads.run(10**6, go.wait, 60)) for _ in range(4)]
            await asyncio.sleep(0)
            async with asyncio.timeout(30):
                assert await threads.run(INLINE + 1, threading.get_ident) != threading.get_ident()
                assert await threads.run(INLINE, threading.get_ident) == threading.get_ident()
            assert not any(task.done() for task in long)
            go.set()
            assert await asyncio.gather(*long) == [True] * 4
        finally:
            go.set()
            threads.close()

    asyncio.run(run())


def test_what_the_work_raises_reaches_the_caller():
    async def run(size: int) -> str:
        threads = InputThreads()
        try:
            await threads.run(size, int, "x")
        except ValueError as error:
            return str(error)
        finally:
            threads.close()
        return ""

    assert asyncio.run(run(1)) == asyncio.run(run(10**4)) == asyncio.run(run(10**6)) != ""
