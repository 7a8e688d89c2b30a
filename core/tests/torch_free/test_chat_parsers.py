"""What parsers make of a model's output: the same events however the text was cut, nothing invented, nothing lost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.chat.events import Content, Reasoning, ToolArguments, ToolStart
from anychip.chat.parsers.harmony import Harmony
from anychip.chat.parsers.plain_json import ArgumentsOnly, JsonListTools, LlamaJsonTools, PythonicTools
from anychip.chat.parsers.reasoning import GraniteReasoning, PlainText, TagReasoning
from anychip.chat.parsers.registry import choose_parsers
from anychip.chat.parsers.tagged_json import DeepSeekTools, HermesTools, MistralTools
from anychip.errors import ConfigError


def read(parser, pieces) -> dict:
    """Everything that the events say, put together."""
    seen = {"reasoning": "", "content": "", "calls": []}
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    for event in events:
        match event:
            case Reasoning(text):
                seen["reasoning"] += text
            case Content(text):
                seen["content"] += text
            case ToolStart(index, call_id, name):
                assert index == len(seen["calls"]) and len(call_id) == 9
                seen["calls"].append([name, ""])
            case ToolArguments(index, text):
                assert index == len(seen["calls"]) - 1, "arguments of a call that is not the newest"
                seen["calls"][index][1] += text
    return seen


def call(name: str, arguments: object) -> list:
    return [name, arguments]


HERMES = 'Let me look.\n<tool_call>\n{"name": "f", "arguments": {"a": "x}\\"{", "b": [1, {"c": null}]}}\n</tool_call>'
TWO = HERMES + '\n<tool_call>{"arguments": {"z": 1}, "name": "g"}</tool_call>\n'
DEEPSEEK = (
    "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"a": 1}\n```<｜tool▁call▁end｜>\n'
    '<｜tool▁call▁begin｜>g<｜tool▁sep｜>{"b": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
HARMONY = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"a": 1}<|call|>'
)

CASES = [
    (HermesTools, HERMES, "Let me look.", [call("f", {"a": 'x}"{', "b": [1, {"c": None}]})]),
    (HermesTools, TWO, "Let me look.", [call("f", {"a": 'x}"{', "b": [1, {"c": None}]}), call("g", {"z": 1})]),
    (HermesTools, "No call <tool_ here>.\n ", "No call <tool_ here>.\n ", []),
    (HermesTools, '<tool_call>{"name": "f"}</tool_call>', "", [call("f", {})]),
    (HermesTools, '<tool_call>{"name": "f", "arguments": "text"}</tool_call>', "", [call("f", "text")]),
    (HermesTools, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [call("f", {})]),
    (HermesTools, '<tool_call>{"name": "f", "arguments": " "}</tool_call>', "", [call("f", {})]),
    (HermesTools, '<tool_call>{"name": "f", "arguments": "null"}</tool_call>', "", [call("f", {})]),
    (HermesTools, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [call("f", {"a": 1})]),
    (HermesTools, '<tool_call>{"a": {"name": "no"}}</tool_call>x', '<tool_call>{"a": {"name": "no"}}</tool_call>x', []),
    (LlamaJsonTools, '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "",
     [call("f", {"a": 1}), call("g", {})]),
    (LlamaJsonTools, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [call("f", {"a": 1})]),
    (LlamaJsonTools, "Hello {there}", "Hello {there}", []),
    (LlamaJsonTools, '{"answer": 42} is it', '{"answer": 42} is it', []),
    (LlamaJsonTools, '{"answer": 4', '{"answer": 4', []),
    (JsonListTools, '[{"name": "f", "parameters": {"a": "]"}}, {"name": "g", "parameters": {"b": []}}]', "",
     [call("f", {"a": "]"}), call("g", {"b": []})]),
    (JsonListTools, "[1, 2]", "[1, 2]", []),
    (MistralTools, 'Ok [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "Ok",
     [call("f", {"a": 1}), call("g", {})]),
    (MistralTools, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{"b": {}}', "",
     [call("f", {"a": 1}), call("g", {"b": {}})]),
    (DeepSeekTools, DEEPSEEK, "Sure.", [call("f", {"a": 1}), call("g", {"b": 2})]),
    (PythonicTools, '[f(a="x, (y)", b=[1, {"c": None}]), m.g()]', "",
     [call("f", {"a": "x, (y)", "b": [1, {"c": None}]}), call("m.g", {})]),
    (PythonicTools, "[f(a=true, b={'c': null})]", "", [call("f", {"a": True, "b": {"c": None}})]),
    (PythonicTools, "[1, 2] are numbers", "[1, 2] are numbers", []),
    (PythonicTools, "[link](http://x) is no call", "[link](http://x) is no call", []),
    (Harmony, HARMONY, "", [call("f", {"a": 1})]),
    (Harmony, "<|channel|>final<|message|>Hi!<|return|>", "Hi!", []),
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 250), max_size=12))
def test_outputs_are_read_the_same_however_they_are_cut(case, cuts):
    make, text, content, calls = case
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    seen = read(make(), [text[a:b] for a, b in pairwise(bounds)])
    assert seen["content"] == content
    assert [[name, json.loads(arguments)] for name, arguments in seen["calls"]] == calls


@pytest.mark.parametrize("case", CASES, ids=[f"{make.__name__}-{number}" for number, (make, *_) in enumerate(CASES)])
def test_outputs_are_read_character_by_character(case):
    make, text, content, calls = case
    seen = read(make(), text)
    assert seen["content"] == content
    assert [[name, json.loads(arguments)] for name, arguments in seen["calls"]] == calls


@settings(max_examples=300, deadline=None)
@given(
    make=st.sampled_from(
        [HermesTools, LlamaJsonTools, JsonListTools, MistralTools, DeepSeekTools, PythonicTools, Harmony]
    ),
    pieces=st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(['{"name": "f"', '"arguments": {', "}", "]", "<tool_call>", "</tool_call>", "[TOOL_CALLS]",
                             "<|channel|>", "<|message|>", "[f(", ")", '"', "\\", "<｜tool▁call▁begin｜>"]),
        ),
        max_size=12,
    ),
)  # fmt: skip
def test_no_output_breaks_a_parser(make, pieces):
    assert read(make(), pieces) == read(make(), "".join(pieces))


def test_arguments_come_while_they_are_written():
    parser = HermesTools()
    parser.feed('<tool_call>{"name": "f", "arguments": {"text": "lo')
    assert parser.feed("ng st") == [ToolArguments(0, "ng st")]


def test_named_arguments_are_the_whole_output():
    assert read(ArgumentsOnly("f"), ['{"a"', ": 1}"])["calls"] == [["f", '{"a": 1}']]


@pytest.mark.parametrize(
    ("make", "text", "inside", "reasoning", "content"),
    [
        (TagReasoning, "<think>\nHm, so.\n</think>\n\nYes.", False, "Hm, so.", "Yes."),
        (TagReasoning, "Hm.\n</think>Yes.", True, "Hm.", "Yes."),
        (TagReasoning, "Yes <think>.", False, "", "Yes <think>."),
        (TagReasoning, "<think></think>Yes.", False, "", "Yes."),
        (TagReasoning, "<think>cut off", False, "cut off", ""),
        (TagReasoning, "cut off </thi", True, "cut off </thi", ""),
        (GraniteReasoning, "Here is my thought process: a Here is my response: b", False, "a", "b"),
    ],
)
def test_reasoning_is_what_stands_between_the_tags(make, text, inside, reasoning, content):
    for pieces in ([text], list(text)):
        seen = read(make(PlainText(), inside=inside), pieces)
        assert (seen["reasoning"], seen["content"]) == (reasoning, content)


def test_reasoning_comes_before_tool_calls():
    seen = read(TagReasoning(HermesTools(), inside=False), list("<think>Hm</think>\n" + HERMES))
    assert seen["reasoning"] == "Hm" and seen["content"] == "Let me look." and len(seen["calls"]) == 1


def test_harmony_reads_both():
    assert read(Harmony(), list(HARMONY))["reasoning"] == "Hm."


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ '<tool_call>' }}{{ '<think>' }}", "hermes", "think"),
        ("[TOOL_CALLS]", "mistral", None),
        ("<|channel|>analysis", "harmony", "harmony"),
        ("{{ messages }}", None, None),
        (None, None, None),
    ],
)
def test_parsers_follow_the_template(template, tools, reasoning):
    chosen = choose_parsers("auto", "auto", template, {})
    assert (chosen.tools, chosen.reasoning) == (tools, reasoning)


def test_an_unknown_parser_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="known are auto, none, deepseek, harmony, hermes"):
        choose_parsers("hermez", "auto", None, {})
