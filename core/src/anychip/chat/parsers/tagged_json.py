"""Tool calls as JSON between markers: Hermes and Qwen, Mistral, DeepSeek. A marker inside a JSON string is part of the
string. Text that looks like a call and is none is the answer's, as it was written."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from anychip.chat.events import Event, ToolArguments, ToolStart, new_call_id
from anychip.chat.parsers.json_call import Brackets, JsonCall
from anychip.chat.parsers.scan import NAME, SPACE, ContentText, Head, Parts, StateReader, match_head, read_call


class TaggedTools(StateReader, ABC):
    """Reads text with calls in it."""

    def __init__(self) -> None:
        super().__init__("text")
        self._content = ContentText()
        self._count = 0
        self._call: JsonCall | None = None  # an object with a name, from its beginning
        self._lead = ""  # what stands before it
        self._arguments: Brackets | None = None  # of a call whose head gave the name
        self._unclosed = False  # text follows a call whose end marker has not come

    def finish(self) -> list[Event]:
        held, events = self._buffer.take_all(), list[Event]()
        if self._call is not None and self._call.started:
            events = self._call.finish()
        elif self._call is not None:
            events = self._content.add(self._lead + self._call.raw + held)
        elif self._state in ("text", "head"):
            events = self._content.add(held)
        # Else what is held is the beginning of the marker that ends a call.
        return events + self._content.rest()

    def _read_object(self, after: str) -> list[Event]:
        """A call as an object; `after` is the state that follows it."""
        assert self._call is not None
        events = read_call(self._call, self._lead, self._buffer, self._content)
        if self._call.failed:
            self._call, self._state = None, "text"
        elif self._call.over:
            self._call, self._state, self._count = None, after, self._count + 1
        return events

    def _start_arguments(self, head: Head) -> list[Event]:
        """The head of a call, which ends with the bracket that its arguments begin with."""
        self._buffer.take(head.end - 1)
        self._content.call()
        self._state, self._arguments, self._count = "arguments", Brackets(), self._count + 1
        return [ToolStart(self._count - 1, new_call_id(), head.names[0])]

    def _read_arguments(self) -> list[Event]:
        assert self._arguments is not None
        text = self._buffer.take(self._arguments.take(self._buffer.text, 0))
        if self._arguments.done:
            self._state = "tail"
        return [ToolArguments(self._count - 1, text)]

    def _read_tail(self) -> list[Event]:
        """What ends a call, if it is there."""
        tail = match_head(self._buffer.text, *self._tails())
        if tail.verdict != "more":
            self._buffer.take(tail.end)
            self._state, self._unclosed = "text", tail.verdict == "no"
        return []

    @abstractmethod
    def _tails(self) -> Sequence[Parts]:
        """The ways in which a call may end, with what stands between it and its end."""


class HermesTools(TaggedTools):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them, with text around."""

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def _read_text(self) -> list[Event]:
        before, marker = self._buffer.take_until((self._OPEN, self._CLOSE) if self._unclosed else (self._OPEN,))
        if marker is not None:
            self._unclosed = False
        if marker == self._OPEN:
            self._call, self._lead, self._state = JsonCall(self._count, bare=True), marker, "call"
        return self._content.add(before)

    def _read_call(self) -> list[Event]:
        return self._read_object("tail")

    def _tails(self) -> Sequence[Parts]:
        return ((SPACE, self._CLOSE),)


class MistralTools(TaggedTools):
    """[TOOL_CALLS][{...}, {...}], and the newer [TOOL_CALLS]name[ARGS]{...} for each call."""

    _OPEN = "[TOOL_CALLS]"
    _LISTS: Sequence[Parts] = ((_OPEN, SPACE, "{"), (_OPEN, SPACE, "[", SPACE, "{"))
    _NAMED: Sequence[Parts] = (
        (_OPEN, SPACE, NAME, SPACE, "[ARGS]", SPACE, "{"),
        (_OPEN, SPACE, NAME, SPACE, "[CALL_ID]", NAME, "[ARGS]", SPACE, "{"),
    )
    _COMMA = re.compile(r"[\s,]{0,256}")

    def __init__(self) -> None:
        super().__init__()
        self._listed = False

    def _read_text(self) -> list[Event]:
        before, marker = self._buffer.take_until((self._OPEN,))
        if marker is not None:
            self._buffer.text, self._state = marker + self._buffer.text, "head"
        return self._content.add(before)

    def _read_head(self) -> list[Event]:
        head = match_head(self._buffer.text, *self._LISTS, *self._NAMED)
        if head.verdict == "more":
            return []
        if head.verdict == "no":
            self._state = "text"
            return self._content.add(self._buffer.take(len(self._OPEN)))
        if head.names:
            self._listed = False
            return self._start_arguments(head)
        self._lead = self._buffer.take(head.end - 1)
        self._listed = self._lead.rstrip() != self._OPEN
        self._call, self._state = JsonCall(self._count, bare=True), "call"
        return []

    def _read_call(self) -> list[Event]:
        return self._read_object("between")

    def _read_between(self) -> list[Event]:
        """After one call of a list."""
        following = match_head(self._buffer.text, (self._COMMA, "{"))
        end = match_head(self._buffer.text, *self._tails())
        if following.verdict == "yes" and self._listed:
            self._lead = self._buffer.take(following.end - 1)
            self._call, self._state = JsonCall(self._count, bare=True), "call"
        elif end.verdict != "more" and not (self._listed and following.verdict == "more"):
            self._state = "tail"
        return []

    def _tails(self) -> Sequence[Parts]:
        return ((self._COMMA, "]"),) if self._listed else ()


class DeepSeekTools(TaggedTools):
    """DeepSeek's calls: V3 writes `function`, a separator, the name and a fenced JSON block, V3.1 the name, a
    separator and the JSON."""

    _ALL = "<｜tool▁calls▁begin｜>"
    _OPEN, _SEP, _CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    _END = "<｜tool▁calls▁end｜>"
    _FENCED: Parts = (_OPEN, SPACE, "function", SPACE, _SEP, SPACE, NAME, SPACE, "```json", SPACE, "{")
    _PLAIN: Parts = (_OPEN, SPACE, NAME, SPACE, _SEP, SPACE, "{")
    _HEADS: Sequence[Parts] = (_FENCED, _PLAIN, (_ALL, SPACE, *_FENCED), (_ALL, SPACE, *_PLAIN))

    def __init__(self) -> None:
        super().__init__()
        self._open = False  # calls were read, and the marker that ends them all has not come

    def _read_text(self) -> list[Event]:
        markers = [self._ALL, self._OPEN, *[self._END] * self._open, *[self._CLOSE] * self._unclosed]
        before, marker = self._buffer.take_until(markers)
        if marker is not None:
            self._unclosed = False
        if marker == self._END:
            self._open = False
        elif marker in (self._ALL, self._OPEN):
            self._buffer.text, self._state = marker + self._buffer.text, "head"
        return self._content.add(before)

    def _read_head(self) -> list[Event]:
        head = match_head(self._buffer.text, *self._HEADS)
        if head.verdict == "more":
            return []
        if head.verdict == "yes":
            self._open = True
            return self._start_arguments(head)
        self._state = "text"
        marker = self._ALL if self._buffer.text.startswith(self._ALL) else self._OPEN
        return self._content.add(self._buffer.take(len(marker)))

    def finish(self) -> list[Event]:
        held = self._buffer.text
        if self._state in ("text", "head") and self._open and self._content.after_call and self._END.startswith(held):
            self._buffer.take_all()  # the marker was cut
        return super().finish()

    def _tails(self) -> Sequence[Parts]:
        return ((SPACE, "```", SPACE, self._CLOSE), (SPACE, self._CLOSE))
