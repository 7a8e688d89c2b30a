"""GPT-OSS's harmony: messages on channels. `analysis` is reasoning, `final` the answer, and a message addressed to a
function is a call of it."""

from __future__ import annotations

import re

from anychip.chat.events import Content, Event, Reasoning, ToolArguments, ToolStart, new_call_id
from anychip.chat.parsers.scan import TextBuffer

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_TO = re.compile(r"to=(?:functions\.)?([\w.\-]+)")


class Harmony:
    """Both kinds of parser in one: the format does not separate them. The prompt ends with <|start|>assistant."""

    def __init__(self) -> None:
        self._buffer = TextBuffer()
        self._header: str | None = ""  # what stands before <|message|>; None within a message
        self._kind = "final"
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        self._buffer.add(text)
        events: list[Event] = []
        while True:
            if self._header is not None:
                before, marker = self._buffer.take_until((_MESSAGE,))
                self._header += before
                if marker is None:
                    return events
                events += self._open(self._header)
                self._header = None
            else:
                body, marker = self._buffer.take_until((*_ENDS, _START, _CHANNEL))
                events += self._body(body)
                if marker is None:
                    return events
                self._header = ""

    def finish(self) -> list[Event]:
        held = self._buffer.take_all()
        if self._header is None:
            return self._body(held)
        # No channel at all: a model that answers plainly.
        text = self._header + held
        return [] if any(marker in text for marker in (_START, _CHANNEL)) or not text else [Content(text)]

    def _open(self, header: str) -> list[Event]:
        called = _TO.search(header)
        if called is not None:
            self._kind, self._count = "call", self._count + 1
            return [ToolStart(self._count - 1, new_call_id(), called[1])]
        self._kind = "analysis" if "analysis" in header else "final"
        return []

    def _body(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._kind == "call":
            return [ToolArguments(self._count - 1, text)]
        return [Reasoning(text)] if self._kind == "analysis" else [Content(text)]
