"""Batch files in OpenAI's format: what a line may hold, and what comes of it."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
from served_kit import ScriptedLLM

from anychip.entrypoints.cli.run_batch import _answer_all, _read
from anychip.entrypoints.serving import Serving
from anychip.errors import ConfigError


def answered(tmp_path, lines: list[str], llm: ScriptedLLM) -> dict[str, dict]:
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(lines))
    out = io.StringIO()
    serving = Serving.of(llm)  # type: ignore[arg-type]
    asyncio.run(_answer_all(serving, _read(str(file)), out, 4))
    return {line["custom_id"]: line["response"] for line in map(json.loads, out.getvalue().split("\n")[:-1])}


CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_null_is_not_given_and_streams_are_answers(tmp_path):
    llm = ScriptedLLM()
    lines = [
        json.dumps({"custom_id": "plain", "body": CHAT}),
        json.dumps({"custom_id": "nulls", "url": None, "method": None, "body": CHAT | {"n": None, "stream": None}}),
        json.dumps({"custom_id": "stream", "body": CHAT | {"stream": True}}),
        json.dumps({"custom_id": "text", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": None}}),
    ]
    found = answered(tmp_path, lines, llm)
    assert {response["status_code"] for response in found.values()} == {200}
    assert [asked[1].max_tokens for asked in llm.asked] == [None, None, None, 16]


def test_texts_hold_any_separator_and_values_any_size(tmp_path):
    llm = ScriptedLLM()
    body = {"prompt": "a\u2028b\x85c"}
    lines = [
        json.dumps({"custom_id": "lines", "url": "/v1/completions", "body": body}, ensure_ascii=False),
        '{"custom_id": "big", "body": {"messages": [{"role": "user", "content": "x"}], "n": 1' + "0" * 400 + "}}",
        '{"custom_id": "nan", "body": {"messages": [{"role": "user", "content": "x"}], "top_p": 1e999}}',
    ]
    found = answered(tmp_path, lines, llm)
    assert {name: response["status_code"] for name, response in found.items()} == {"lines": 200, "big": 400, "nan": 400}
    assert llm.asked[0][0] == body["prompt"]


def test_long_answers_are_written_whole(tmp_path):
    body = CHAT | {"logprobs": True, "top_logprobs": 3, "prompt_logprobs": 2}
    (response,) = answered(tmp_path, [json.dumps({"custom_id": "a", "body": body})], ScriptedLLM("y" * 500)).values()
    assert len(response["body"]["choices"][0]["logprobs"]["content"]) == 500


@pytest.mark.parametrize(
    "line", ['{"custom_id": null, "body": {}}', '{"custom_id": "a", "body": null}', "[]", "{", "1"]
)
def test_lines_that_are_no_requests_are_named(tmp_path, line):
    file = tmp_path / "in.jsonl"
    file.write_text("\n" + line)
    with pytest.raises(ConfigError, match=":2 is no batch request"):
        _read(str(file))
