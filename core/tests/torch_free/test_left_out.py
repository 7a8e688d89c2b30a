"""null, and a parameter's documented default, are the same as leaving it out: of every route, wherever it stands."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from served_kit import ScriptedLLM, with_client

from anychip.entrypoints.anthropic import protocol as anthropic_protocol
from anychip.entrypoints.anthropic.routes import BODIES as ANTHROPIC_BODIES
from anychip.entrypoints.http.body import Parameters
from anychip.entrypoints.openai import chat_protocol, protocol
from anychip.entrypoints.openai.routes import BODIES as OPENAI_BODIES
from anychip.entrypoints.openai.stateful import protocol as stateful_protocol

HI = [{"role": "user", "content": "x"}]
FUNCTION = {"name": "f"}
LEAST: dict[type[BaseModel], dict[str, Any]] = {
    protocol.CompletionBody: {"prompt": "x"},
    chat_protocol.ChatBody: {"messages": HI},
    chat_protocol.ChatMessage: {"role": "user", "content": "x"},
    chat_protocol.MessageToolCall: {"id": "c", "function": FUNCTION},
    chat_protocol.FunctionCall: FUNCTION,
    chat_protocol.ToolBody: {"type": "function", "function": FUNCTION},
    chat_protocol.FunctionBody: FUNCTION,
    chat_protocol.NamedFunction: FUNCTION,
    chat_protocol.NamedTool: {"function": FUNCTION},
    chat_protocol.ContentPart: {"type": "text"},
    protocol.ResponseFormat: {"type": "text"},
    stateful_protocol.ResponsesBody: {"input": "x"},
    stateful_protocol.FunctionTool: {"type": "function"},
    stateful_protocol.ChosenFunction: {"type": "function", "name": "f"},
    anthropic_protocol.MessagesBody: {"model": "m", "max_tokens": 5, "messages": HI},
    anthropic_protocol.CountTokensBody: {"model": "m", "messages": HI},
    anthropic_protocol.MessageBody: HI[0],
    anthropic_protocol.Block: {"type": "text"},
    anthropic_protocol.ToolBody: {"name": "f"},
    anthropic_protocol.ToolChoiceBody: {"type": "auto"},
}
for body in OPENAI_BODIES:
    if "tokens" in body.model_fields:
        LEAST[body] = {"tokens": [1]}


def models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return {annotation} if issubclass(annotation, BaseModel) else set()
    return {found for part in typing.get_args(annotation) for found in models_in(part)}


def all_models() -> list[type[BaseModel]]:
    found, new = set(), {*OPENAI_BODIES, *ANTHROPIC_BODIES}
    while new:
        found |= new
        new = {m for model in new for f in model.model_fields.values() for m in models_in(f.annotation)} - found
    return sorted(found, key=lambda model: f"{model.__module__}.{model.__name__}")


OPTIONAL = [
    (model, field.alias or name)
    for model in all_models() for name, field in model.model_fields.items() if not field.is_required()
]  # fmt: skip


def test_every_body_and_what_stands_in_it_is_walked():
    assert len(all_models()) > 20 and len(OPTIONAL) > 150
    assert all(issubclass(model, Parameters) for model in all_models())


@pytest.mark.parametrize(("model", "name"), OPTIONAL, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_null_is_the_same_as_leaving_it_out(model, name):
    least = {key: value for key, value in LEAST.get(model, {}).items() if key != name}
    assert model.model_validate_json(json.dumps(least | {name: None})) == model.model_validate(least)


# -- over HTTP --------------------------------------------------------------------------------------------

SERVED = ScriptedLLM()

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": HI},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"model": "m", "max_tokens": 5, "messages": HI},
    "/v1/messages/count_tokens": {"model": "m", "messages": HI},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
REQUIRED = {"prompt", "messages", "input", "tokens"}


def documented() -> dict[str, list[str]]:
    """The parameters that the makers' own clients send."""
    from anthropic.types import message_create_params as messages
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chat
    from openai.types.responses import response_create_params as responses

    forms = {
        "/v1/completions": completions.CompletionCreateParamsNonStreaming,
        "/v1/chat/completions": chat.CompletionCreateParamsNonStreaming,
        "/v1/responses": responses.ResponseCreateParamsNonStreaming,
        "/v1/messages": messages.MessageCreateParamsNonStreaming,
    }
    names = {path: list(typing.get_type_hints(form)) for path, form in forms.items()}
    ours = {"/v1/completions": protocol.CompletionBody, "/v1/chat/completions": chat_protocol.ChatBody}
    return {
        path: sorted({*names.get(path, ()), *(ours[path].model_fields if path in ours else ()), "invented_tomorrow"})
        for path in ROUTES
    }


def asked_of(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """The status, and what reached the engine or came back."""
    SERVED.asked.clear()

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(path, json=body)

    answer = with_client(SERVED, ask)
    return answer.status_code, list(SERVED.asked) or answer.json()


@pytest.mark.parametrize("path", ROUTES)
def test_a_client_that_sends_every_parameter_as_null_is_answered_as_one_that_sends_none(path):
    pytest.importorskip("openai")
    pytest.importorskip("anthropic")
    nulls = {name: None for name in documented()[path] if name not in ROUTES[path]}
    plain = asked_of(path, ROUTES[path])
    assert plain[0] == 200
    assert asked_of(path, ROUTES[path] | nulls) == plain


FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
NESTED = [
    ("/v1/chat/completions", {"stream_options": {"include_usage": None, "include_obfuscation": None, "new": None}}, {}),
    ("/v1/chat/completions",
     {"response_format": FORMAT | {"json_schema": FORMAT["json_schema"] | {"strict": None, "description": None}}},
     {"response_format": FORMAT}),
    ("/v1/chat/completions",
     {"tools": [{"type": "function", "function": FUNCTION | {"parameters": None, "strict": None, "new": None}}]},
     {"tools": [{"type": "function", "function": FUNCTION}]}),
    ("/v1/chat/completions",
     {"messages": [HI[0] | {"name": None, "tool_calls": None, "refusal": None, "audio": None, "new": None}]}, {}),
    ("/v1/chat/completions",
     {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "annotations": None}]}]}, {}),
    ("/v1/responses", {"text": {"format": {"type": "text", "strict": None}, "verbosity": None}}, {}),
    ("/v1/responses", {"text": {"format": None}, "stream_options": {"include_obfuscation": None}}, {}),
    ("/v1/responses", {"input": [{"type": None, "role": "user", "content": "x", "id": None, "status": None}]},
     {"input": [{"role": "user", "content": "x"}]}),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "citations": None}]}]},
     {}),
    ("/v1/messages", {"tools": [{"name": "f", "input_schema": {}, "type": None, "cache_control": None}],
                      "tool_choice": {"type": "auto", "disable_parallel_tool_use": None}},
     {"tools": [{"name": "f", "input_schema": {}}]}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "given", "same"), NESTED)
def test_null_within_a_parameter_is_the_same_as_leaving_it_out(path, given, same):
    expected = asked_of(path, ROUTES[path] | same)
    assert expected[0] == 200
    assert asked_of(path, ROUTES[path] | given) == expected


DEFAULTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "best_of": 1, "echo": False, "frequency_penalty": 0, "max_tokens": 16, "n": 1, "presence_penalty": 0,
        "stream": False, "temperature": 1, "top_p": 1, "logit_bias": {}, "suffix": None,
    },
    "/v1/chat/completions": {
        "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0, "n": 1, "stream": False,
        "store": False, "parallel_tool_calls": True, "response_format": {"type": "text"}, "service_tier": "auto",
        "temperature": 1, "top_p": 1, "tool_choice": "none", "modalities": ["text"], "verbosity": "medium",
        "logit_bias": {}, "tools": [],
    },
    "/v1/responses": {
        "background": False, "parallel_tool_calls": True, "store": True, "stream": False, "temperature": 1, "top_p": 1,
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": "auto", "tools": [],
        "truncation": "disabled", "top_logprobs": 0, "service_tier": "auto", "include": [],
    },
    "/v1/messages": {"stream": False, "temperature": 1, "service_tier": "auto", "stop_sequences": [], "tools": []},
    "/tokenize": {"add_special_tokens": True, "return_token_strs": False},
}  # fmt: skip
EACH = [(path, {name: value}) for path, values in DEFAULTS.items() for name, value in values.items()]


@pytest.mark.parametrize(("path", "given"), [*EACH, *DEFAULTS.items()])
def test_a_documented_default_is_the_same_as_leaving_it_out(path, given):
    if path == "/v1/completions" and "best_of" in given:
        assert asked_of(path, ROUTES[path] | {"best_of": 2})[0] == 400
    assert asked_of(path, ROUTES[path] | given) == asked_of(path, ROUTES[path])


def test_what_must_be_given_is_not_null():
    for path, body in ROUTES.items():
        for name in body:
            if name != "model":
                assert asked_of(path, body | {name: None})[0] == 400, (path, name)
