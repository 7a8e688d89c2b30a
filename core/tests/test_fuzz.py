"""Requests that nobody meant: none is answered with status 500, none hangs. tools/fuzz.py sends a hundred thousand."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Server

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from fuzz import BOUNDED, HANG_S, fuzz

ROUTES = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/responses"), ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "/v1/models/{model}"), ("GET", "/v1/responses/{response_id}"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("--device", "cpu", "--kv-cache-bytes", "64M", *BOUNDED)
    yield running
    assert running.stop() == 0


def test_mutated_requests_are_answered(server):
    findings = asyncio.run(fuzz(server, requests=400, seed=7))
    assert findings.broken == []
    assert findings.statuses[200] > 20 and findings.statuses[400] > 100


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_the_document_is_what_the_server_does(server, method, path):
    document = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    operation = document[path][method]

    @given(data=st.data())
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def answered(data):
        case = data.draw(operation.as_strategy())
        response = case.call(base_url=server.url, timeout=HANG_S)
        assert response.status_code < 500, f"{case.body}: {response.text}"

    answered()


DOUBLING = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "x"'
BOMBS = [
    {"structured_outputs": {"regex": "(a{1000}){1000}"}},
    {"structured_outputs": {"regex": "((a{0,100}){0,100}){0,100}b"}},
    {"structured_outputs": {"regex": ".*" * 2000 + "x"}},
    {"structured_outputs": {"grammar": DOUBLING}},
    {"structured_outputs": {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}, "$ref": "#/$defs/a"}}},
    {"structured_outputs": {"json": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}}},
    {"structured_outputs": {"choice": ["x" * 50 + str(i) for i in range(4000)]}},
]


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_ends_within_its_deadline_and_hurts_nobody_else(server, bomb):
    began = time.monotonic()
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 8} | bomb)
    assert answer.status_code in (200, 400), answer.text
    assert time.monotonic() - began < HANG_S
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200


def test_an_operators_template_is_not_a_clients(server):
    bomb = "{% for i in range(10**9) %}x{% endfor %}"
    body = {"messages": [{"role": "user", "content": bomb}], "max_tokens": 1}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200  # it is text, and nothing reads it as a template
    assert server.post("/v1/chat/completions", body | {"chat_template": bomb}).status_code == 400
