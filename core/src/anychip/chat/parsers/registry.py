"""Parsers by name, and which of them a chat template speaks of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anychip.chat.events import OutputParser, ReasoningParser
from anychip.errors import ConfigError
from anychip.registry.blame import imported

AUTO, NONE = "auto", "none"

_HERE = "anychip.chat.parsers"
TOOL_PARSERS = {
    "hermes": f"{_HERE}.tagged_json:HermesTools",
    "mistral": f"{_HERE}.tagged_json:MistralTools",
    "deepseek": f"{_HERE}.tagged_json:DeepSeekTools",
    "llama3_json": f"{_HERE}.plain_json:LlamaJsonTools",
    "pythonic": f"{_HERE}.plain_json:PythonicTools",
    "json": f"{_HERE}.plain_json:JsonListTools",
    "harmony": f"{_HERE}.harmony:Harmony",
}
"""Classes that take no argument and make an OutputParser."""

REASONING_PARSERS = {
    "think": f"{_HERE}.reasoning:TagReasoning",
    "mistral": f"{_HERE}.reasoning:MistralReasoning",
    "seed": f"{_HERE}.reasoning:SeedReasoning",
    "granite": f"{_HERE}.reasoning:GraniteReasoning",
    "harmony": f"{_HERE}.harmony:Harmony",
}
"""ReasoningParser classes; harmony reads reasoning and tools in one."""

_TOOL_SIGNS = (
    ("<|channel|>", "harmony"),
    ("[TOOL_CALLS]", "mistral"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3_json"),
    ("ipython", "llama3_json"),
)
_REASONING_SIGNS = (
    ("<|channel|>", "harmony"),
    ("[THINK]", "mistral"),
    ("<seed:think>", "seed"),
    ("<think>", "think"),
    ("</think>", "think"),
    ("Here is my thought process:", "granite"),
)
SHOWS_SPECIAL_TOKENS = frozenset({"mistral", "deepseek", "harmony", "llama3_json"})
"""Families whose markers are special tokens, which the text must keep for them to be found."""


@dataclass(frozen=True, slots=True)
class ChosenParsers:
    """The names of the tool parser and of the reasoning parser; None: the model has none."""

    tools: str | None
    reasoning: str | None
    make_tools: Callable[[], Any] | None
    make_reasoning: ReasoningParser | None

    @property
    def shows_special_tokens(self) -> bool:
        return bool({self.tools, self.reasoning} & SHOWS_SPECIAL_TOKENS)

    @property
    def read_in_one(self) -> bool:
        """Whether one parser reads both: the model may call before its reasoning ends."""
        return self.reasoning is not None and self.reasoning == self.tools

    def starts_inside(self, prompt: str) -> bool:
        """Whether the prompt ends where the model is thinking already."""
        return self.make_reasoning is not None and self.make_reasoning.starts_inside(prompt)

    def end_marker(self, prompt: str) -> str:
        """What ends the reasoning that the prompt has begun; "" if it has begun none."""
        return self.make_reasoning.end_marker if self.make_reasoning and self.starts_inside(prompt) else ""

    def reader(self, calls: OutputParser, prompt: str) -> OutputParser:
        """Reads the output of this prompt; `calls` reads what is no reasoning."""
        if self.make_reasoning is None:
            return calls
        return self.make_reasoning(calls, inside=self.starts_inside(prompt))


def choose_parsers(
    tools: str, reasoning: str, template: str | None, contributed: Mapping[str, Mapping[str, str]]
) -> ChosenParsers:
    """By name; `auto` goes by what the chat template speaks of. Raises ConfigError for an unknown name."""
    tool_name = _sign(template, _TOOL_SIGNS) if tools == AUTO else tools
    reasoning_name = _sign(template, _REASONING_SIGNS) if reasoning == AUTO else reasoning
    return ChosenParsers(
        tools=None if tool_name in (None, NONE) else tool_name,
        reasoning=None if reasoning_name in (None, NONE) else reasoning_name,
        make_tools=_load("tool", tool_name, {**TOOL_PARSERS, **contributed.get("tool", {})}),
        make_reasoning=_reasoning(reasoning_name, {**REASONING_PARSERS, **contributed.get("reasoning", {})}),
    )


def _sign(template: str | None, signs: tuple[tuple[str, str], ...]) -> str | None:
    return next((name for sign, name in signs if template is not None and sign in template), None)


def _reasoning(name: str | None, known: Mapping[str, str]) -> ReasoningParser | None:
    parser: Any = _load("reasoning", name, known)
    missing = [
        member for member in ("end_marker", "starts_inside") if parser is not None and not hasattr(parser, member)
    ]
    if missing:
        raise ConfigError(f"reasoning parser {name!r} ({known[str(name)]}) has no {missing[0]}; see ReasoningParser")
    made: ReasoningParser | None = parser
    return made


def _load(kind: str, name: str | None, known: Mapping[str, str]) -> Callable[..., Any] | None:
    if name is None or name == NONE:
        return None
    if name not in known:
        raise ConfigError(f"{kind} parser {name!r} is unknown; known are auto, none, {', '.join(sorted(known))}")
    loaded: Callable[..., Any] = imported(known[name])
    return loaded
