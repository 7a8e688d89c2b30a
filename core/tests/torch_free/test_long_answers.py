"""Long lists of an answer are what short ones are, and leave the event loop to others while they are made and sent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_kit import ScriptedLLM, with_client

from anychip.entrypoints.http import long_json
from anychip.entrypoints.http.long_json import GrowingList, JsonResponse, LongList, encoded, listed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(VALUES, max_size=80), VALUES, st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_long_list_is_the_same_json_as_a_short_one(entries, other, piece_s):
    before, long_json._PIECE_S = long_json._PIECE_S, piece_s  # 0: a piece an entry

    async def run() -> tuple[Any, Any]:
        return await listed(iter(entries), len(entries)), await listed(iter(entries), len(entries))

    try:
        first, second = asyncio.run(run())
    finally:
        long_json._PIECE_S = before
    assert isinstance(first, LongList) == (len(entries) > long_json.FEW)
    content = {"a": first, "other": other, "b": [second]}
    assert json.loads(b"".join(encoded(content))) == {"a": entries, "other": other, "b": [entries]}


@given(
    st.lists(st.lists(VALUES, max_size=20), max_size=8), st.sampled_from([0.0, 1.0]), st.sampled_from([0, 30, 2**16])
)
@settings(max_examples=60, deadline=None)
def test_a_list_that_grew_is_what_its_parts_are_together(parts, piece_s, piece_bytes):
    before = long_json._PIECE_S, long_json._PIECE_BYTES
    long_json._PIECE_S, long_json._PIECE_BYTES = piece_s, piece_bytes
    grown, seen = GrowingList(), []

    async def run() -> None:
        for number, part in enumerate(parts):
            if number % 2:
                joined = GrowingList()
                await joined.extend(iter(part))
                grown.join(joined)
                assert json.loads(b"".join(encoded(joined.so_far()))) == part
            else:
                await grown.extend(iter(part))
            seen.append(grown.so_far())

    try:
        asyncio.run(run())
    finally:
        long_json._PIECE_S, long_json._PIECE_BYTES = before
    for number, so_far in enumerate(seen, start=1):  # what was taken on the way does not grow
        assert json.loads(b"".join(encoded(so_far))) == [entry for part in parts[:number] for entry in part]


PROMPT = {"prompt": list(range(256)) * 8, "max_tokens": 1}
MESSAGE = {"messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 1}
ASKED = {"input": "x" * 2000}
LONG = [
    ("/v1/completions", PROMPT | {"prompt_logprobs": 20}, False),
    ("/v1/completions", PROMPT | {"echo": True, "logprobs": 20}, False),
    ("/v1/completions", PROMPT | {"echo": True, "logprobs": 20, "stream": True}, True),
    ("/v1/chat/completions", MESSAGE | {"prompt_logprobs": 20}, False),
    ("/v1/chat/completions", MESSAGE | {"logprobs": True, "top_logprobs": 20}, False),
    ("/v1/responses", ASKED | {"include": ["message.output_text.logprobs"], "top_logprobs": 20}, False),
    ("/v1/responses", ASKED | {"include": ["message.output_text.logprobs"], "top_logprobs": 20, "stream": True}, True),
    ("/tokenize", {"prompt": "x" * 50_000, "return_token_strs": True}, False),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "stream"), LONG)
def test_others_have_their_turn_while_a_long_answer_is_made(path, body, stream):
    llm = ScriptedLLM("y" * 2000)

    async def ask(client: httpx.AsyncClient) -> tuple[int, str]:
        turns = 0
        answered = asyncio.create_task(client.post(path, json=body))
        while not answered.done():
            turns += 1
            await asyncio.sleep(0)
        return turns, (await answered).text

    few, _ = with_client(llm, lambda client: ask_short(client, path, body))
    turns, text = with_client(llm, ask)
    assert turns > few + 10
    parts = [part.rpartition("data: ")[2] for part in text.split("\n\n") if part] if stream else [text]
    assert all(part == "[DONE]" or json.loads(part) for part in parts)


async def ask_short(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """The same with nothing long in it."""
    turns = 0
    plain = {name: body[name] for name in ("prompt", "messages", "input", "max_tokens") if name in body}
    if path == "/tokenize":
        plain = {"prompt": "x"}
    answered = asyncio.create_task(client.post(path, json=plain))
    while not answered.done():
        turns += 1
        await asyncio.sleep(0)
    return turns, (await answered).text


def test_an_answer_says_how_long_it_is():
    response = JsonResponse({"a": LongList((b"[1,", b"2]")), "nan": float("nan")})
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(response({"type": "http"}, None, send))  # type: ignore[arg-type]
    body = b"".join(message.get("body", b"") for message in sent)
    assert json.loads(body) == {"a": [1, 2], "nan": None}
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(body)).encode()
