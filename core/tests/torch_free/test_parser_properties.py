"""Any text, in any pieces, through every parser and every reasoning parser over every tool parser: the result is the
same, and whatever is not markup comes out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.chat.events import Content, Event, ToolArguments, ToolStart
from anychip.chat.parsers.plain_json import ForcedCalls
from anychip.chat.parsers.reasoning import PlainText
from anychip.chat.parsers.registry import NONE, REASONING_PARSERS, TOOL_PARSERS, choose_parsers

_MARKS = [
    "<think>", "</think>", "[THINK]", "[/THINK]", "<seed:think>", "</seed:think>", "Here is my thought process:",
    "Here is my response:", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "```json", "```", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>", "assistant",
    "analysis", "final", "commentary", "to=functions.f", "function",
]  # fmt: skip
_PIECES = ['{"name": "f"', '"arguments": ', '"parameters": ', '{"a": "', "{}", "{", "}", "[", "]", '"', "\\", ", ", ":",
           ";", " ", "\n", "  \n\n", "f(", "a=1", ")", "null", "é🦙",
           '"{\\"a\\": 1}"', '{"name": "f", "arguments": {"a": 1}}']  # fmt: skip
_CALLS = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>',
    "mistral": "[TOOL_CALLS]f[ARGS]%s",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>%s<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "harmony": "<|channel|>commentary to=functions.f<|constrain|>json<|message|>%s<|call|>",
    "llama3_json": '{"name": "f", "parameters": %s}',
    "json": '[{"name": "f", "parameters": %s}]',
}
_TAGGED = ("hermes", "mistral", "deepseek")

parsers = st.tuples(
    st.sampled_from([*sorted(TOOL_PARSERS), "forced", NONE]), st.sampled_from([*sorted(REASONING_PARSERS), NONE])
)
marked = st.sampled_from(_MARKS).flatmap(lambda mark: st.integers(1, len(mark)).map(lambda end: mark[:end]))
soup = st.lists(
    st.one_of(st.sampled_from(_MARKS), st.sampled_from(_PIECES), marked, st.text(max_size=4)), max_size=14
).map("".join)
plain = st.text(st.sampled_from("ab \n\t.{}[]\"'\\():,é🦙"), min_size=1, max_size=20)


def reader(names: tuple[str, str], *, inside: bool = False):
    tools, reasoning = names
    chosen = choose_parsers(NONE if tools == "forced" else tools, reasoning, None, {})
    calls = ForcedCalls(["f", "go"]) if tools == "forced" else chosen.make_tools() if chosen.make_tools else PlainText()
    return calls if chosen.make_reasoning is None else chosen.make_reasoning(calls, inside=inside)


def read(parser, pieces) -> list[Event]:
    """The events, those of one kind that follow each other joined, without the calls' ids."""
    merged: list[Event] = []
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish():
        last = merged[-1] if merged else None
        if isinstance(event, ToolStart):
            merged.append(ToolStart(event.index, "", event.name))
        elif isinstance(event, ToolArguments) and isinstance(last, ToolArguments) and last.index == event.index:
            merged[-1] = ToolArguments(event.index, last.text + event.text)
        elif type(event) is type(last) and not isinstance(event, ToolArguments):
            merged[-1] = type(event)(last.text + event.text)
        else:
            merged.append(event)
    return merged


def text_of(events: list[Event], kind) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


@settings(max_examples=300, deadline=None)
@given(names=parsers, text=soup, cuts=st.lists(st.integers(0, 200), max_size=8), inside=st.booleans())
def test_any_text_reads_the_same_in_any_pieces(names, text, cuts, inside):
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    whole = read(reader(names, inside=inside), [text])
    assert read(reader(names, inside=inside), [text[a:b] for a, b in pairwise(bounds)]) == whole
    assert read(reader(names, inside=inside), text) == whole


@settings(max_examples=300, deadline=None)
@given(names=parsers, text=soup)
def test_text_without_reasoning_and_calls_is_unchanged(names, text):
    """Harmony apart: its markers are special tokens, and never text."""
    events = read(reader(names), text)
    tags = (parser.start_marker for parser in [choose_parsers(NONE, names[1], None, {}).make_reasoning] if parser
            and names[1] != "harmony")  # fmt: skip
    reasons = any(text.lstrip().startswith(tag) for tag in tags)
    if not reasons and "harmony" not in names and all(isinstance(event, Content) for event in events):
        assert text_of(events, Content) == text


@settings(max_examples=150, deadline=None)
@given(
    names=parsers, before=st.sampled_from(["", "def f():", "No."]), space=st.text(st.sampled_from(" \n\t"), max_size=5)
)
def test_white_space_is_kept_where_there_is_no_thinking(names, before, space):
    text = before + space + "x = 1" + space
    assert text_of(read(reader(names), text), Content) == text


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(sorted(_CALLS)),
    inside=st.lists(st.one_of(st.sampled_from(_MARKS), plain), max_size=5).map("".join),
    reasoning=st.sampled_from([NONE, "think"]),
    size=st.integers(1, 9),
)
def test_whatever_stands_in_a_string_is_the_arguments(family, inside, reasoning, size):
    quoted = inside.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    arguments = '{"text": "' + quoted + '"}'
    text = _CALLS[family] % arguments
    events = read(reader((family, reasoning)), [text[at : at + size] for at in range(0, len(text), size)])
    assert events == [ToolStart(0, "", "f"), ToolArguments(0, arguments)]


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(_TAGGED),
    texts=st.lists(st.text(st.sampled_from("ab \n.{}é"), max_size=8), min_size=2, max_size=4),
)
def test_text_around_calls_is_kept_as_it_was(family, texts):
    events = read(reader((family, NONE)), (_CALLS[family] % '{"a": 1}').join(texts))
    assert [event.name for event in events if isinstance(event, ToolStart)] == ["f"] * (len(texts) - 1)
    content = text_of(events, Content)
    assert "".join(content.split()) == "".join("".join(texts).split())
    if texts[0].strip() and texts[-1].strip() and all(text.strip() or not text for text in texts):
        assert content == "".join(texts)


@pytest.mark.parametrize("family", sorted(_CALLS))
def test_a_call_that_is_cut_before_its_arguments_is_shown_or_a_call(family):
    text = _CALLS[family] % '{"a": 1}'
    for end in range(1, len(text)):
        events = read(reader((family, NONE)), text[:end])
        started = any(isinstance(event, ToolStart) for event in events)
        assert started or family == "harmony" or text_of(events, Content) == text[:end]
        assert not (started and text_of(events, Content))


@pytest.mark.parametrize("end", range(1, 60))
def test_a_forced_call_that_is_cut_is_no_content(end):
    text = '[{"name": "get_weather", "parameters": {"city": "Paris"}}]'[:end]
    events = read(ForcedCalls(["get_weather"]), text)
    assert not text_of(events, Content) and [e.name for e in events if isinstance(e, ToolStart)] == ["get_weather"]
