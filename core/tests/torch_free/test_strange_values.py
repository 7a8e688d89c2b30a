"""Values that nobody means are refused, with status 400 and in few words, however strange a body is."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from served_kit import ScriptedLLM, with_client
from test_left_out import NESTED, ROUTES, documented

from anychip.server_config import ServerConfig

SERVED = ScriptedLLM()
NUMBERS = [
    "9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "-1" + "0" * 400, "1e400", "NaN", "-Infinity",
    "1.5", "1" * 5000, "-1", "0",
]  # fmt: skip
STRANGE = [*NUMBERS, '"x"', '"\\u0000"', "[]", "{}", "[[]]", "[null]", "[1e400]", "true", '["' + "x" * 100 + '"]']
RAW = [
    b"", b"null", b"[]", b"1", b"{", b"\xff\xfe", b'{"a": "\xff"}', b'{"model": "\\ud800"}', b"[" * 100_000,
    b'{"a":' * 100_000, b'{"model": "m", "model": "m"}', b"\xef\xbb\xbf{}", json.dumps({"x" * 100_000: 1}).encode(),
    json.dumps({"model": "x" * 100_000}).encode(), json.dumps({"messages": [{"x" * 100_000: 1}]}).encode(),
]  # fmt: skip


def statuses(path: str, bodies: list[bytes], config: ServerConfig | None = None) -> list[httpx.Response]:
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post(path, content=body) for body in bodies]

    return with_client(SERVED, ask, config)


def with_value(body: dict[str, Any], name: str, value: str) -> bytes:
    """The value is written as it is: json would refuse some."""
    return json.dumps(body | {name: "@"}).replace('"@"', value).encode()


@pytest.mark.parametrize("path", ROUTES)
def test_strange_values_of_any_parameter_are_answered(path):
    pytest.importorskip("openai")
    names = [name for name in documented()[path] if name != "stream"]
    bodies = [with_value(ROUTES[path], name, value) for name in names for value in STRANGE]
    for body, answer in zip(bodies, statuses(path, bodies), strict=True):
        assert answer.status_code in (200, 400, 404), (body[:200], answer.text)
        assert answer.status_code == 200 or len(answer.json()["error"]["message"]) < 1000, body[:200]


@pytest.mark.parametrize("config", [None, ServerConfig(lenient=True)])
@pytest.mark.parametrize("path", ROUTES)
def test_bodies_that_are_none_are_refused(path, config):
    bodies = [*RAW, with_value(ROUTES[path], "unknown", "NaN"), with_value({"unknown": None}, "temperature", "NaN")]
    for body, answer in zip(bodies, statuses(path, bodies, config), strict=True):
        assert answer.status_code in (200, 400, 404), (body[:100], answer.text)
        assert len(answer.content) < 2000, body[:100]


@pytest.mark.parametrize(("path", "given", "same"), NESTED)
def test_strange_values_within_parameters_are_answered(path, given, same):
    text = json.dumps(ROUTES[path] | given)
    bodies = [text.replace("null", value).encode() for value in STRANGE]
    for body, answer in zip(bodies, statuses(path, bodies), strict=True):
        assert answer.status_code in (200, 400), (body[:300], answer.text)


MANY = [
    b'{"prompt": [' + b"[]," * 100_000 + b"[]]}", b'{"prompt": [' + b'"",' * 100_000 + b'""]}',
    b'{"prompt": "x", "metadata": {"a": [' + b"{}," * 100_000 + b"{}]}}",
]  # fmt: skip


@pytest.mark.parametrize("body", MANY, ids=range(len(MANY)))
def test_a_body_of_many_values_is_refused_before_they_are_made(body):
    (answer,) = statuses("/v1/completions", [body])
    assert answer.status_code == 400 and "at most 65536 may be" in answer.json()["error"]["message"]


def test_what_stands_in_texts_is_no_value():
    text = '[{"a": "b\\\\"}, {}]' * 20_000
    (answer,) = statuses("/tokenize", [json.dumps({"prompt": text}).encode()])
    assert answer.status_code == 200 and answer.json()["count"] == len(text)
