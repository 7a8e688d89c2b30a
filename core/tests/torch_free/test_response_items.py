"""What of a turn belongs to which item of a response."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from anychip.chat.events import Content, Event, Reasoning, ToolArguments, ToolStart
from anychip.entrypoints.http.long_json import GrowingList, encoded
from anychip.entrypoints.openai.stateful.builder import ResponseBuilder
from anychip.entrypoints.openai.stateful.protocol import ResponsesBody

TURNS = st.lists(st.tuples(st.sampled_from(["message", "reasoning", "call"]), st.integers(1, 4)), max_size=8)


def events_of(kind: str, call: int, first: bool) -> list[Event]:
    if kind == "message":
        return [Content("x")]
    if kind == "reasoning":
        return [Reasoning("x")]
    return [*([ToolStart(call, f"call_{call}", "f")] if first else []), ToolArguments(call, "x")]


@given(turns=TURNS)
def test_a_message_has_the_logprobs_of_its_own_tokens(turns):
    builder, token, expected, before = ResponseBuilder(ResponsesBody(input="x"), "m"), 0, list[list[int]](), None

    async def told(ids: list[int]) -> None:
        newest = GrowingList()
        await newest.extend(ids)
        builder.take_logprobs(newest)

    done: list[dict[str, Any]] = []
    for call, (kind, count) in enumerate(turns):
        for at in range(count):
            asyncio.run(told([token]))
            for event in events_of(kind, call, first=at == 0):
                done += [item for item in builder.take(event) if item["type"] == "response.output_text.done"]
            if kind == "message":
                if before != "message":
                    expected.append([])
                expected[-1].append(token)
            before, token = kind, token + 1
    done += [item for item in builder.end("stop", None, token) if item["type"] == "response.output_text.done"]
    messages = [item for item in builder.final["output"] if item["type"] == "message"]
    assert [json.loads(b"".join(encoded(m["content"][0]["logprobs"]))) for m in messages] == expected
    assert [json.loads(b"".join(encoded(item["logprobs"]))) for item in done] == expected
