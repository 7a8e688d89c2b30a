"""Reading text in pieces: markers that may be cut anywhere, heads of calls, and the text around calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from anychip.chat.events import Content, Event

SPACE = re.compile(r"\s{0,256}")
NAME = re.compile(r"[\w.:/\-]{1,256}")
"""A function's name. Longer ones, and longer white space, are no head of a call: so heads are short."""


class TextBuffer:
    """Text that has come and was not taken yet."""

    def __init__(self) -> None:
        self.text = ""

    def add(self, text: str) -> None:
        self.text += text

    def take_until(self, markers: Sequence[str]) -> tuple[str, str | None]:
        """The text before the first marker, and that marker, both taken. Without one: the text that can be no
        marker's beginning, and None."""
        found = [(at, marker) for marker in markers if (at := self.text.find(marker)) >= 0]
        if found:
            at, marker = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            before, self.text = self.text[:at], self.text[at + len(marker) :]
            return before, marker
        kept = max((_overlap(self.text, marker) for marker in markers), default=0)
        before, self.text = self.text[: len(self.text) - kept], self.text[len(self.text) - kept :]
        return before, None

    def take(self, length: int) -> str:
        text, self.text = self.text[:length], self.text[length:]
        return text

    def take_all(self) -> str:
        text, self.text = self.text, ""
        return text


def _overlap(text: str, marker: str) -> int:
    """How long a beginning of the marker the text ends with."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


class StateReader:
    """A parser whose states are the names of the methods that read on, `_read_<state>`. Each returns its events, and
    leaves in the buffer what is not settled yet."""

    def __init__(self, state: str) -> None:
        self._buffer = TextBuffer()
        self._state = state

    def feed(self, text: str) -> list[Event]:
        self._buffer.add(text)
        events: list[Event] = []
        while self._buffer.text:
            before = self._state, len(self._buffer.text)
            events += getattr(self, f"_read_{self._state}")()
            if (self._state, len(self._buffer.text)) == before:
                break
        return events


@dataclass(frozen=True, slots=True)
class Head:
    """Whether a text begins with a head: `more` says that more text may make it one. `end` is where the head ends,
    `names` what its patterns of NAME found."""

    verdict: Literal["yes", "no", "more"]
    end: int = 0
    names: tuple[str, ...] = ()


Parts = Sequence[str | re.Pattern[str]]


def match_head(text: str, *heads: Parts) -> Head:
    """The first of the heads that the text begins with. The parts of a head are literals, and patterns that take all
    they can; its last part is a literal."""
    found = [_match(text, parts) for parts in heads]
    for verdict in ("yes", "more"):
        for head in found:
            if head.verdict == verdict:
                return head
    return Head("no")


def _match(text: str, parts: Parts) -> Head:
    at = 0
    names: list[str] = []
    for part in parts:
        if isinstance(part, str):
            if not text.startswith(part, at):
                return Head("more" if part.startswith(text[at:]) else "no")
            at += len(part)
        else:
            hit = part.match(text, at)
            if hit is None:
                return Head("more" if at == len(text) else "no")
            at = hit.end()
            if part is not SPACE:
                names.append(hit[0])
    return Head("yes", at, tuple(names))


class ContentText:
    """The answer's text around tool calls. It is kept as it was, but for white space at its beginning or end that is
    next to a call, and white space between two calls: that belongs to the format."""

    def __init__(self) -> None:
        self._any = False
        self.after_call = False  # a call stands after the newest text
        self._space = ""  # white space after the newest text
        self._space_after_call = ""

    def add(self, text: str) -> list[Event]:
        if not text:
            return []
        if text.isspace():
            if self.after_call:
                self._space_after_call += text
            else:
                self._space += text
            return []
        body = text.rstrip()
        end = text[len(body) :]
        between = self._space + self._space_after_call if self._any or not self.after_call else ""
        if self.after_call and not self._any:
            body = body.lstrip()
        self._any, self.after_call, self._space, self._space_after_call = True, False, end, ""
        return [Content(between + body)]

    def call(self) -> None:
        """A tool call stands here."""
        self.after_call, self._space_after_call = True, ""

    def rest(self) -> list[Event]:
        """The white space at the end, unless it is next to a call."""
        text, self._space = self._space, ""
        return [Content(text)] if text and not self.after_call else []


class GrowingCall(Protocol):
    """A call that is read while it grows; JsonCall says what the attributes mean."""

    over: bool
    started: bool

    @property
    def failed(self) -> bool: ...

    @property
    def raw(self) -> str: ...

    def feed(self, text: str) -> tuple[list[Event], str]: ...

    def finish(self) -> list[Event]: ...


def read_call(call: GrowingCall, lead: str, buffer: TextBuffer, content: ContentText) -> list[Event]:
    """Feeds the buffer's text to a call; `lead` stands before it. A call that has failed is text: its lead is content,
    and the rest goes back to the buffer, since another call may stand within it."""
    events, buffer.text = call.feed(buffer.take_all())
    if call.started:
        content.call()
    if call.failed:
        events += content.add(lead)
        buffer.text = call.raw + buffer.text
    return events
