"""What parsers read reaches clients of every API, whole or streamed, the same."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from served_kit import ScriptedLLM, with_client

from anychip.server_config import ServerConfig

LLM = ScriptedLLM(gap=0.0)
ARGUMENTS = [
    '{"a": "caf\\u00e9 \\ud83e\\udd99", "b": {"c": [1, null]}}',
    '{"a": "\\ud83e"}',
    '{"a": 1e400, "b": NaN, "c": -Infinity}',
    "{}",
    '{"a": "</tool_call> é\\n<|call|>',
]
CALLS = {
    "hermes": 'Sure.\n<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>',
    "mistral": "Sure.\n[TOOL_CALLS]f[ARGS]%s",
    "deepseek": "Sure.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>%s"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "harmony": "<|channel|>final<|message|>Sure.<|end|><|start|>assistant to=functions.f"
    "<|channel|>commentary<|message|>%s",
    "json": '[{"name": "f", "parameters": %s}]',
    "llama3_json": '{"name": "f", "parameters": %s}',
}  # fmt: skip
TEXTS = [" \n", "Hi.\n", "<think>", "<think>Hm.</think>\n\n  Hi. ", "<tool_call>", "[f(a=1, b=[True])]", "[{}] 🦙"]
ASKED = {"role": "user", "content": "x"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [ASKED], "n": 2, "tools": [{"type": "function", "function": FUNCTION}]},
    "/v1/responses": {"input": "x", "store": True, "tools": [{"type": "function", **FUNCTION}]},
    "/v1/messages": {
        "model": "m", "max_tokens": 9, "messages": [ASKED],
        "tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}],
    },
}  # fmt: skip


def from_chat(whole: dict | None, events: list[dict]) -> list[Any]:
    """Of each choice: text, reasoning, and calls."""
    if whole is not None:
        messages = [choice["message"] for choice in whole["choices"]]
        return [
            [m["content"] or "", m.get("reasoning_content") or "",
             [(call["function"]["name"], call["function"]["arguments"]) for call in m.get("tool_calls") or []]]
            for m in messages
        ]  # fmt: skip
    seen: list[Any] = [["", "", []], ["", "", []]]
    for event in events:
        for choice in event["choices"]:
            delta, answer = choice["delta"], seen[choice["index"]]
            answer[0] += delta.get("content") or ""
            answer[1] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or []:
                if call.get("id"):
                    answer[2].append((call["function"]["name"], ""))
                name, arguments = answer[2][call["index"]]
                answer[2][call["index"]] = (name, arguments + (call["function"].get("arguments") or ""))
    return seen


def from_responses(whole: dict | None, events: list[dict]) -> list[Any]:
    output = (whole or events[-1]["response"])["output"]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    own = "".join(part["text"] for item in output if item["type"] == "message" for part in item["content"])
    assert whole is not None or text == own
    return [
        own,
        "".join(part["text"] for item in output if item["type"] == "reasoning" for part in item["content"]),
        [(item["name"], item["arguments"]) for item in output if item["type"] == "function_call"],
    ]


def from_messages(whole: dict | None, events: list[dict]) -> list[Any]:
    if whole is not None:
        return [
            [block["type"], block.get("text") or block.get("thinking") or block.get("name")]
            for block in whole["content"]
        ]
    seen: list[Any] = []
    for event in events:
        if event["type"] == "content_block_start":
            seen.append([event["content_block"]["type"], event["content_block"].get("name") or ""])
        elif event["type"] == "content_block_delta" and "partial_json" not in event["delta"]:
            seen[event["index"]][1] += event["delta"].get("text") or event["delta"].get("thinking") or ""
    return seen


READ = {"/v1/chat/completions": from_chat, "/v1/responses": from_responses, "/v1/messages": from_messages}


def answers(answer: str, path: str, config: ServerConfig) -> tuple[list[Any], list[Any]]:
    """The answer in one piece, and streamed a token at a time."""

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post(path, json={**BODIES[path], "stream": stream}) for stream in (False, True)]

    LLM.answer = answer
    whole, streamed = with_client(LLM, ask, config)
    assert (whole.status_code, streamed.status_code) == (200, 200)
    lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    assert not any(event.get("type") == "error" or ("error" in event and event["error"]) for event in events)
    return READ[path](whole.json(), []), READ[path](None, events)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("family", CALLS)
def test_calls_are_the_same_whole_and_streamed(family, path):
    config = ServerConfig(tool_parser=family, reasoning_parser="harmony" if family == "harmony" else "none")
    for arguments in ARGUMENTS:
        whole, streamed = answers(CALLS[family] % arguments, path, config)
        assert whole == streamed
        if path == "/v1/chat/completions":
            given = [[("f", call[2][0][1])] for call in whole]
            assert [call[2] for call in whole] == given and whole[0][2][0][1].startswith(arguments)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "parsers", [("hermes", "think"), ("pythonic", "think"), ("json", "none"), ("harmony", "harmony")]
)
def test_texts_are_the_same_whole_and_streamed(parsers, path):
    config = ServerConfig(tool_parser=parsers[0], reasoning_parser=parsers[1])
    for text in TEXTS:
        whole, streamed = answers(text, path, config)
        assert whole == streamed


@pytest.mark.parametrize("depth", [1, 100, 500, 900, 990, 3000])
def test_a_call_that_is_no_plain_object_is_still_answered(depth):
    """Its input stands under a name of its own, where no answer could hold it as a value."""
    config = ServerConfig(tool_parser="hermes", reasoning_parser="none")
    for path in BODIES:
        call = CALLS["hermes"] % ('{"a": ' + "[" * depth + "9" * 50 + "]" * depth + "}")
        whole, streamed = answers(call, path, config)
        assert whole == streamed
