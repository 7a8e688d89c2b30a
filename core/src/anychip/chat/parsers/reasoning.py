"""Reasoning between two tags, before the answer."""

from __future__ import annotations

from typing import ClassVar

from anychip.chat.events import Content, Event, OutputParser, Reasoning
from anychip.chat.parsers.scan import SPACE, TextBuffer, match_head


class TagReasoning:
    """Text between two markers is reasoning, what follows is `rest`'s to read. White space next to a marker belongs to
    the format. `inside`: the prompt ends within the reasoning, as templates do that write the start marker themselves;
    one that the model writes as well is left out.

    Without a start marker at the beginning, and not `inside`, there is no reasoning: everything is `rest`'s, unchanged.
    """

    start_marker: ClassVar[str] = "<think>"
    end_marker: ClassVar[str] = "</think>"

    def __init__(self, rest: OutputParser, *, inside: bool) -> None:
        self._rest = rest
        self._buffer = TextBuffer()
        self._inside = inside
        self._state = "before"
        self._fresh = True  # the newest marker is next to what comes
        self._space = ""  # white space in the reasoning, which may be next to the end marker

    @classmethod
    def starts_inside(cls, prompt: str) -> bool:
        return prompt.rstrip().endswith(cls.start_marker)

    def feed(self, text: str) -> list[Event]:
        if self._state == "nothing":
            return self._rest.feed(text)
        self._buffer.add(text)
        if self._state == "before" and not self._enter():
            return []
        if self._state == "reasoning":
            return self._reasoning()
        return self._answer(self._buffer.take_all())

    def finish(self) -> list[Event]:
        held = self._space + self._buffer.take_all()
        if self._state == "before" and self._inside:
            self._state, held = "reasoning", held.lstrip()
        events: list[Event] = []
        if held:
            events = [Reasoning(held)] if self._state == "reasoning" else self._rest.feed(held)
        return events + self._rest.finish()

    def _enter(self) -> bool:
        """Whether it is settled what the text begins with."""
        head = match_head(self._buffer.text, (SPACE, self.start_marker))
        if head.verdict == "more":
            return False
        if head.verdict == "yes":
            self._buffer.take(head.end)
        self._state = "reasoning" if self._inside or head.verdict == "yes" else "nothing"
        return True

    def _reasoning(self) -> list[Event]:
        if self._fresh:
            self._buffer.text = self._buffer.text.lstrip()
            self._fresh = not self._buffer.text
        text, found = self._buffer.take_until((self.end_marker,))
        body = text.rstrip()
        events: list[Event] = [Reasoning(self._space + body)] if body else []
        self._space = text[len(body) :] if body else self._space + text
        if found is None:
            return events
        self._state, self._fresh, self._space = "answer", True, ""
        return events + self._answer(self._buffer.take_all())

    def _answer(self, text: str) -> list[Event]:
        if self._state == "answer" and self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return self._rest.feed(text) if text else []


class MistralReasoning(TagReasoning):
    start_marker, end_marker = "[THINK]", "[/THINK]"


class SeedReasoning(TagReasoning):
    start_marker, end_marker = "<seed:think>", "</seed:think>"


class GraniteReasoning(TagReasoning):
    start_marker, end_marker = "Here is my thought process:", "Here is my response:"


class PlainText:
    """Everything is the answer."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []
