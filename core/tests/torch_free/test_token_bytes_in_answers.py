"""Log-probabilities name the bytes of their tokens in every form: joined they are the text's, whatever is divided."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_kit import ScriptedLLM, with_client

from anychip.entrypoints.openai.responses import TextOffsets

WHOLE, STREAMED = ScriptedLLM(), ScriptedLLM(gap=0.0)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="�"), min_size=1, max_size=12)
CHAT = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
RESPONSE = {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 2}


def answers(path: str, body: dict[str, Any], text: str, *, stream: bool) -> list[dict[str, Any]]:
    """The answer, or a stream's events."""
    llm = STREAMED if stream else WHOLE
    llm.answer = text

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(path, json=body | {"stream": stream})

    answer = with_client(llm, ask)
    assert answer.status_code == 200, answer.text
    if not stream:
        return [answer.json()]
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def joined(entries: list[dict[str, Any]]) -> str:
    return b"".join(bytes(entry["bytes"]) for entry in entries).decode()


@pytest.mark.parametrize("stream", [False, True])
@given(text=TEXTS)
@settings(max_examples=15, deadline=None)
def test_the_bytes_of_a_chats_tokens_are_its_text(stream, text):
    choices = [answer["choices"][0] for answer in answers("/v1/chat/completions", CHAT, text, stream=stream)]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert joined(entries) == text
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
@given(text=TEXTS)
@settings(max_examples=15, deadline=None)
def test_the_bytes_of_a_responses_tokens_are_its_text(stream, text):
    last = answers("/v1/responses", RESPONSE, text, stream=stream)[-1]
    content = (last["response"] if stream else last)["output"][0]["content"][0]
    assert content["text"] == text == joined(content["logprobs"])


def data_of(token: str) -> bytes:
    return (
        bytes(int(digits, 16) for digits in re.findall(r"\\x(..)", token)) if token[:6] == "bytes:" else token.encode()
    )


@pytest.mark.parametrize("stream", [False, True])
@given(prompt=TEXTS, text=TEXTS)
@settings(max_examples=15, deadline=None)
def test_an_echoed_completions_tokens_are_its_text_and_begin_where_it_says(stream, prompt, text):
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "prompt_logprobs": 2}
    choices = [answer["choices"][0] for answer in answers("/v1/completions", body, text, stream=stream)]
    whole = "".join(choice["text"] for choice in choices)
    scored = [choice["logprobs"] for choice in choices]
    tokens = [data_of(token) for part in scored for token in part["tokens"]]
    assert b"".join(tokens).decode() == whole == prompt + text
    begun = 0
    for data, offset in zip(tokens, (at for part in scored for at in part["text_offset"]), strict=True):
        assert offset == len(whole.encode()[:begun].decode(errors="ignore"))
        begun += len(data)
    # Tokens that are parts of characters do not take each other's place.
    assert all(len(top) == 2 for part in scored for top in part["top_logprobs"] if top is not None)
    entries = [next(iter(entry.values())) for entry in choices[0]["prompt_logprobs"][1:]]
    found = b"".join(bytes(e["bytes"]) if "bytes" in e else e["decoded_token"].encode() for e in entries)
    assert prompt.encode().endswith(found) and len(found) == len(prompt.encode()) - 1


@given(st.lists(st.integers(0, 255), max_size=20))
@settings(max_examples=100, deadline=None)
def test_offsets_of_any_ids_are_those_of_the_text_that_they_make(ids):
    offsets = TextOffsets(WHOLE.tokenizer, skip_special_tokens=True)
    found = [offsets.take(token) for token in ids]
    data = [WHOLE.tokenizer.token_bytes(token) for token in ids]
    text = b"".join(data).decode("utf-8", "replace")
    assert found == sorted(found) and all(0 <= offset <= len(text) for offset in found)
    for token, offset in zip(data, found, strict=True):
        if token.isascii():
            # A broken character before it may end first: of up to three bytes, each of which may stand for itself.
            assert token.decode() in text[offset : offset + 4]
