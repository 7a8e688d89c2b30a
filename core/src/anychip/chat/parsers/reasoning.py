"""Reasoning between two tags, before the answer."""

from __future__ import annotations

from anychip.chat.events import Content, Event, OutputParser, Reasoning
from anychip.chat.parsers.scan import TextBuffer


class TagReasoning:
    """Text between `start` and `end` is reasoning, what follows is `rest`'s to read. `inside`: the prompt ends within
    the reasoning, as templates do that write the start tag themselves.

    Without a start tag at the beginning there is no reasoning, unless an end tag comes: models that leave the start
    out are read as if it had been there only when the prompt says so.
    """

    start = "<think>"
    end = "</think>"

    def __init__(self, rest: OutputParser, *, inside: bool) -> None:
        self._rest = rest
        self._buffer = TextBuffer()
        self._state = "reasoning" if inside else "before"
        self._fresh = True  # white space that borders a tag is the format's

    def feed(self, text: str) -> list[Event]:
        if self._state == "answer":
            return self._answer(text)
        self._buffer.add(text)
        if self._state == "before" and not self._enter():
            return []
        return self._read()

    def finish(self) -> list[Event]:
        held = self._buffer.take_all()
        events: list[Event] = []
        if held:
            events = [Reasoning(held)] if self._state == "reasoning" else self._rest.feed(held)
        return events + self._rest.finish()

    def _enter(self) -> bool:
        """Whether it is settled if the text begins with the start tag."""
        text = self._buffer.text.lstrip()
        if text.startswith(self.start):
            self._buffer.text = text[len(self.start) :]
            self._state = "reasoning"
        elif self.start.startswith(text):
            return False
        else:
            self._state = "answer"
        return True

    def _read(self) -> list[Event]:
        if self._state == "answer":
            return self._rest.feed(self._buffer.take_all())
        if self._fresh:
            self._buffer.text = self._buffer.text.lstrip()
            self._fresh = not self._buffer.text
        text, found = self._buffer.take_until((self.end,))
        if found is None:
            body = text.rstrip()
            self._buffer.text = text[len(body) :] + self._buffer.text
            return [Reasoning(body)] if body else []
        self._state, self._fresh = "answer", True
        events: list[Event] = [Reasoning(text.rstrip())] if text.rstrip() else []
        return events + self._answer(self._buffer.take_all())

    def _answer(self, text: str) -> list[Event]:
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return self._rest.feed(text) if text else []


class MistralReasoning(TagReasoning):
    start, end = "[THINK]", "[/THINK]"


class SeedReasoning(TagReasoning):
    start, end = "<seed:think>", "</seed:think>"


class GraniteReasoning(TagReasoning):
    start, end = "Here is my thought process:", "Here is my response:"


class PlainText:
    """Everything is the answer."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []
