"""Unmodified clients of other people, pointed at a server: they change the base URL and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field
from served import Server
from transformers import AutoModelForCausalLM, AutoTokenizer

from anychip.hub import resolve_folder

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": WEATHER}}
ASK: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
MODEL = "quickstart"


class Person(BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=120)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("--device", "cpu", "--dtype", "float32", "--kv-cache-bytes", "64M", "--api-key", "secret")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


# -- openai -----------------------------------------------------------------------------------------------


def test_openai_answers_and_streams(client):
    whole = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_openai_calls_a_tool_that_it_must(client, choice):
    request: Any = {
        "model": MODEL, "messages": ASK, "tools": [TOOL], "tool_choice": choice, "max_tokens": 300,
        "parallel_tool_calls": False,
    }  # fmt: skip
    answer = client.chat.completions.create(**request).choices[0]
    with client.chat.completions.stream(**request) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    for choice_made in (answer, streamed):
        assert choice_made.finish_reason == "tool_calls"
        (call,) = choice_made.message.tool_calls
        assert call.function.name == "get_weather"
        assert set(json.loads(call.function.arguments)) == {"city", "days"}
    # What the tool says goes back into the conversation.
    call = answer.message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    more = client.chat.completions.create(
        model=MODEL, messages=[*ASK, answer.message, result], tools=[TOOL], max_tokens=4
    )
    assert more.choices[0].finish_reason in ("length", "stop")


def test_openai_without_a_need_calls_nothing(client):
    answer = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], max_tokens=8, temperature=0)
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content


def test_openai_parses_a_pydantic_model(client):
    answer = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Person, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_openai_completions_echo_and_score(client):
    choice = client.completions.create(model=MODEL, prompt="import os", max_tokens=2, echo=True, logprobs=2).choices[0]
    assert choice.text.startswith("import os")
    assert choice.logprobs.token_logprobs[0] is None and len(choice.logprobs.tokens) == len(choice.logprobs.text_offset)
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)


def test_openai_responses_are_stored_continued_and_deleted(client):
    first = client.responses.create(model=MODEL, input="How do I sort a list?", max_output_tokens=6)
    assert first.status == "incomplete" and first.output_text
    second = client.responses.create(
        model=MODEL, input="And then?", previous_response_id=first.id, max_output_tokens=4, instructions="Be brief."
    )
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert client.responses.input_items.list(first.id).data[0].content == "How do I sort a list?"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_openai_responses_stream_tool_calls_and_text(client):
    tools: Any = [{"type": "function", **TOOL["function"], "strict": True}]
    with client.responses.stream(
        model=MODEL, input="Weather?", tools=tools, tool_choice="required", max_output_tokens=400
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.output[0].name == "get_weather" and set(json.loads(final.output[0].arguments)) == {"city", "days"}
    parsed = client.responses.parse(model=MODEL, input="x", text_format=Person, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Person)


def test_openai_learns_what_was_wrong(client):
    with pytest.raises(openai.BadRequestError, match="temperature is 500"):
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=500)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4", messages=ASK)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    assert client.models.list().data[0].id == MODEL


# -- anthropic --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0)


def test_anthropic_answers_streams_and_counts(claude):
    request: Any = {"model": MODEL, "max_tokens": 10, "messages": ASK, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**request)
    with claude.messages.stream(**request) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].text == text == final.content[0].text
    assert whole.stop_reason == final.stop_reason == "max_tokens"
    counted = claude.messages.count_tokens(model=MODEL, messages=ASK).input_tokens
    assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_anthropic_uses_tools_and_returns_results(claude):
    tools: Any = [{"name": "get_weather", "description": "The weather", "input_schema": WEATHER}]
    request: Any = {"model": MODEL, "max_tokens": 300, "tools": tools, "tool_choice": {"type": "any"}, "messages": ASK}
    with claude.messages.stream(**request) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    block = message.content[0]
    assert block.name == "get_weather" and set(block.input) == {"city", "days"}
    result: Any = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sunny"}]}
    follow_up = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert claude.messages.create(model=MODEL, max_tokens=3, messages=follow_up, tools=tools).usage.output_tokens > 0


def test_anthropic_continues_a_prefilled_answer_and_stops_where_told(claude):
    prefilled = [*ASK, {"role": "assistant", "content": "1, 2, 3,"}]
    assert claude.messages.create(model=MODEL, max_tokens=4, messages=prefilled).content
    stopped = claude.messages.create(model=MODEL, max_tokens=40, messages=ASK, stop_sequences=["e"])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "e"


def test_anthropic_learns_what_was_wrong(claude):
    with pytest.raises(anthropic.BadRequestError, match="text only"):
        image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
        claude.messages.create(model=MODEL, max_tokens=3, messages=[{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong").messages.create(model=MODEL, max_tokens=3, messages=ASK)


# -- others -----------------------------------------------------------------------------------------------


def test_litellm(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask a site for prices
    import litellm

    common: Any = {"model": f"openai/{MODEL}", "api_base": f"{server.url}/v1", "api_key": "secret", "messages": ASK}
    answer = litellm.completion(**common, max_tokens=6, temperature=0)
    chunks = list(litellm.completion(**common, max_tokens=6, temperature=0, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    forced = litellm.completion(**common, tools=[TOOL], tool_choice="required", max_tokens=300)
    assert forced.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_langchain(server):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=f"{server.url}/v1", api_key="secret", max_tokens=300, temperature=0)
    assert chat.invoke("How do I sort a list?").content
    assert "".join(chunk.content for chunk in chat.stream("Hi"))
    person = chat.with_structured_output(Person, method="json_schema").invoke("Who?")
    assert isinstance(person, Person)
    called = chat.bind_tools([TOOL], tool_choice="required").invoke("Weather?")
    assert called.tool_calls[0]["name"] == "get_weather"


def test_prometheus_parses_the_metrics(server, client):
    client.completions.create(model=MODEL, prompt="x", max_tokens=3)
    families = {family.name: family for family in text_string_to_metric_families(server.client.get("/metrics").text)}
    assert {sample.labels["model_name"] for sample in families["anychip_generation_tokens"].samples} == {MODEL}
    assert families["anychip_time_to_first_token_seconds"].type == "histogram"
    assert families["anychip_engine_up"].samples[0].value == 1


QUESTIONS = [
    ("def add(a, b):\n    return a", [" + b", " banana", " import"], 0),
    ("import", [" os", " )", " }}"], 0),
    ("for i in range(", ["10):", "class", " lambda"], 0),
    ("class Stack:\n    def __init__(self", ["):", " while", "]["], 0),
    ("if x is not", [" None:", " def", " lambda lambda"], 0),
    ("try:\n    f()\nexcept", [" ValueError:", " return return", " ]"], 0),
]
TASK = """
task: pieces
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_lm_eval_scores_as_transformers_does(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    data = tmp_path / "pieces.jsonl"
    lines = [{"text": text, "choices": choices, "label": label} for text, choices, label in QUESTIONS]
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "pieces.yaml").write_text(TASK.format(data=data))
    folder = resolve_folder(MODEL)
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL, "base_url": f"{server.url}/v1/completions", "tokenizer": str(folder),
            "num_concurrent": 1, "max_length": 512, "tokenized_requests": True,
        },
        tasks=["pieces"], task_manager=TaskManager(include_path=str(tmp_path)), log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    scored = {
        (sample["doc"]["text"], choice): float(response[0][0])
        for sample in results["samples"]["pieces"]
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True)
    }
    expected = by_transformers(folder)
    assert scored.keys() == expected.keys()
    for key, value in expected.items():
        assert scored[key] == pytest.approx(value, abs=2e-3), key
    right = sum(
        max(choices, key=lambda choice: expected[text, choice]) == choices[label] for text, choices, label in QUESTIONS
    )
    assert results["results"]["pieces"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


def by_transformers(folder: Path) -> dict[tuple[str, str], float]:
    """Each choice's log-likelihood after its text."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for text, choices, _ in QUESTIONS:
        for choice in choices:
            before, whole = tokenizer(text)["input_ids"], tokenizer(text + choice)["input_ids"]
            with torch.inference_mode():
                logprobs = torch.log_softmax(model(torch.tensor([whole])).logits[0], dim=-1)
            found[text, choice] = sum(
                logprobs[position - 1, whole[position]].item() for position in range(len(before), len(whole))
            )
    return found
