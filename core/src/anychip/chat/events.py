"""What a model's output means, in pieces: the one form that every chat API is written from."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A tool call begins; its arguments follow. `index` counts the calls of one answer."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """More of a call's arguments, which are JSON in the end."""

    index: int
    text: str


Event = Reasoning | Content | ToolStart | ToolArguments


class OutputParser(Protocol):
    """Reads one sequence's text as it comes. What it has given out is never taken back; the events of a text do not
    depend on how it was cut."""

    def feed(self, text: str) -> list[Event]:
        """What so much more text settles."""
        ...

    def finish(self) -> list[Event]:
        """What was held back, at the sequence's end."""
        ...


class ReasoningParser(Protocol):
    """What makes a parser of reasoning, a class as a rule: TagReasoning and Harmony are two."""

    end_marker: str
    """Text that ends the reasoning: a grammar begins after it. "": it has no end that could be looked for."""

    def starts_inside(self, prompt: str) -> bool:
        """Whether the prompt ends where the model is thinking already."""
        ...

    def __call__(self, rest: OutputParser, *, inside: bool) -> OutputParser:
        """A parser of one sequence. It hands what is no reasoning to `rest`, and takes over its events."""
        ...


def new_call_id() -> str:
    """Nine letters and digits would do for Mistral's templates, which refuse longer ones; so these have nine."""
    return uuid.uuid4().hex[:9]
