"""A reader of many streams who is slow lets them wait, each with little, and loses nothing."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.entrypoints.openai.completions import _interleave
from anychip.errors import EngineDead


def piece(number: int, finished: bool) -> RequestOutput:
    output = SequenceOutput(index=0, token_ids=[number], text="x", finish_reason="stop" if finished else None)
    return RequestOutput(request_id="r", prompt_token_ids=[1], outputs=[output], finished=finished)


def test_streams_are_not_read_far_ahead_of_their_reader():
    made = [0] * 16
    closed = []

    async def stream(number: int):
        try:
            for count in range(200):
                made[number] += 1
                yield piece(count, count == 199)
        finally:
            closed.append(number)

    async def run() -> None:
        taken: dict[int, list[int]] = {number: [] for number in range(16)}
        async with aclosing(_interleave([stream(number) for number in range(16)])) as pieces:
            async for number, output in pieces:
                taken[number] += output.outputs[0].token_ids
                await asyncio.sleep(0)
                assert sum(made) - sum(map(len, taken.values())) <= 3 * 16
        assert all(ids == list(range(200)) for ids in taken.values())

    asyncio.run(run())
    assert sorted(closed) == list(range(16))


def test_one_that_fails_ends_the_others():
    closed = []

    async def endless(number: int):
        try:
            while True:
                yield piece(0, False)
        finally:
            closed.append(number)

    async def fails():
        yield piece(0, False)
        raise EngineDead("gone")

    async def run() -> None:
        async with aclosing(_interleave([endless(0), endless(1), fails()])) as pieces:
            async for _ in pieces:
                pass

    with pytest.raises(EngineDead, match="gone"):
        asyncio.run(run())
    assert sorted(closed) == [0, 1]
