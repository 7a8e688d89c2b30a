"""What a turn asks of a grammar, and of the parsers that were chosen."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from llguidance import LLMatcher, LLTokenizer

from anychip.chat.events import Content, Reasoning, ToolArguments, ToolStart
from anychip.chat.parsers.reasoning import PlainText, TagReasoning
from anychip.chat.parsers.registry import REASONING_PARSERS, choose_parsers
from anychip.entrypoints.turn import AnswerSoFar, Tool, ToolChoice, TurnRequest, _forced_calls
from anychip.errors import ConfigError
from anychip.sampling_params import SamplingParams, StructuredOutput
from anychip.structured_output.grammar import to_grammar


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}])
def test_a_function_without_parameters_is_called_without_arguments(parameters):
    tool = Tool(name="f", parameters=parameters)
    assert tool.schema == {"type": "object", "additionalProperties": False} | (
        {"properties": {}} if not parameters or "properties" in parameters else {}
    )
    assert tool.for_template()["function"]["parameters"]["type"] == "object"


@pytest.mark.parametrize("schema", [{"additionalProperties": {"type": "integer"}}, {"properties": {"a": {}}}])
def test_a_schema_that_allows_arguments_stays_as_it_is(schema):
    assert Tool(name="f", parameters={"type": "object", **schema}).schema == {"type": "object", **schema}


def problem(schema: object) -> str:
    return LLMatcher.validate_grammar(to_grammar(StructuredOutput("json_schema", json.dumps(schema))))


@pytest.mark.parametrize("name", ["path", "password", "binary", "byte", "uuid4", "base64", "decimal", "regex", "mine"])
def test_a_format_that_is_not_enforced_is_a_note(name):
    text = {"type": "string", "format": name}
    assert problem(text) == ""
    assert problem({"type": "object", "properties": {"format": text, "b": {"anyOf": [text, {"enum": [text]}]}}}) == ""


@pytest.mark.parametrize("name", ["default", "examples", "enum", "const", "format", "properties", "$ref"])
def test_properties_may_have_the_names_of_keywords(name):
    assert problem({"type": "object", "properties": {name: {"type": "string", "format": "path"}}}) == ""


def follows(tools: list[Tool], text: str) -> bool:
    """Whether a forced call may be this text."""
    request = TurnRequest(
        messages=[], sampling=SamplingParams(), tools=tools, tool_choice=ToolChoice(mode="required", parallel=True)
    )
    forced = _forced_calls(request)
    assert forced is not None
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, to_grammar(forced))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_tools_may_have_definitions_of_the_same_name():
    def tool(name: str, kind: str, where: str) -> Tool:
        schema = {"type": "object", "properties": {"a": {"$ref": f"#/{where}/Item"}}, "required": ["a"],
                  "additionalProperties": False, where: {"Item": {"type": kind}}}  # fmt: skip
        return Tool(name=name, parameters=schema)

    tools = [tool("f", "string", "$defs"), tool("g.x", "integer", "$defs"), tool("h", "boolean", "definitions")]
    for name, value in [("f", '"a"'), ("g.x", "1"), ("h", "true")]:
        for right in ('"a"', "1", "true"):
            call = f'[{{"name": "{name}", "parameters": {{"a": {right}}}}}]'
            assert follows(tools, call) == (right == value)


def test_a_tools_schema_may_refer_to_itself():
    tree = {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    assert follows([Tool(name="f", parameters=tree)], '[{"name": "f", "parameters": {"a": {"a": {}}}}]')
    assert not follows([Tool(name="f", parameters=tree)], '[{"name": "f", "parameters": {"a": 1}}]')


def test_formats_that_are_enforced_and_keywords_that_cannot_be_stay():
    assert '"format":"date"' in to_grammar(StructuredOutput("json_schema", '{"type":"string","format":"date"}'))
    assert "uniqueItems" in problem({"type": "array", "uniqueItems": True})


@pytest.mark.parametrize(
    ("name", "prompt", "marker"),
    [
        ("think", "<|im_start|>assistant\n<think>\n", "</think>"),
        ("think", "<|im_start|>assistant\n", ""),
        ("mistral", "[THINK]", "[/THINK]"),
        ("harmony", "<|start|>assistant", "<|channel|>final<|message|>"),
        ("none", "<think>", ""),
    ],
)
def test_parsers_say_what_ends_the_reasoning_that_a_prompt_begins(name, prompt, marker):
    chosen = choose_parsers("none", name, None, {})
    assert chosen.end_marker(prompt) == marker
    assert chosen.starts_inside(prompt) == bool(marker)


class Dots(TagReasoning):
    start_marker, end_marker = "...", "!!!"


@pytest.fixture
def brought(monkeypatch):
    module = ModuleType("brought_parsers")
    module.Dots, module.plain = Dots, PlainText  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "brought_parsers", module)
    return {"reasoning": {"dots": "brought_parsers:Dots", "plain": "brought_parsers:plain"}}


def test_a_reasoning_parser_of_a_package_says_where_reasoning_begins_and_ends(brought):
    chosen = choose_parsers("none", "dots", None, brought)
    assert chosen.end_marker("go ...") == "!!!"
    reader = chosen.reader(PlainText(), "go ...")
    assert reader.feed("hm!!! yes") + reader.finish() == [Reasoning("hm"), Content("yes")]


def test_a_reasoning_parser_that_does_not_say_so_is_refused(brought):
    with pytest.raises(ConfigError, match="reasoning parser 'plain' .* has no end_marker"):
        choose_parsers("none", "plain", None, brought)


def test_every_reasoning_parser_says_where_reasoning_ends():
    for name in REASONING_PARSERS:
        parser = choose_parsers("none", name, None, {}).make_reasoning
        assert parser is not None and parser.end_marker and not parser.starts_inside("Hi")


def test_an_answer_is_its_events_put_together():
    answer = AnswerSoFar()
    answer.add([Reasoning("a"), Content("b"), ToolStart(0, "id", "f"), ToolArguments(0, "{"), Reasoning("c")])
    answer.add([ToolArguments(0, "}"), Content("d")])
    assert (answer.reasoning, answer.content) == ("ac", "bd")
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", "{}")]
