"""Tool calls as JSON objects between markers: Hermes and Qwen, Mistral, DeepSeek."""

from __future__ import annotations

from anychip.chat.events import Content, Event, ToolArguments, ToolStart, new_call_id
from anychip.chat.parsers.scan import ContentText, JsonCall, TextBuffer


class HermesTools:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them, with text around."""

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self._buffer = TextBuffer()
        self._content = ContentText()
        self._call: JsonCall | None = None
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        self._buffer.add(text)
        events: list[Event] = []
        while True:
            if self._call is None:
                before, marker = self._buffer.take_until((self._OPEN,))
                events += self._content.add(before)
                if marker is None:
                    return events
                self._content.call()
                self._call = JsonCall(self._count)
                self._count += 1
            else:
                inside, marker = self._buffer.take_until((self._CLOSE,))
                if not self._call.done:
                    events += self._call.feed(inside)[0]
                if marker is None:
                    return events
                events += self._unread(self._call)
                self._call = None

    def finish(self) -> list[Event]:
        events: list[Event] = []
        held = self._buffer.take_all()
        if self._call is not None:
            if not self._call.done:
                events += self._call.feed(held)[0]
            events += self._unread(self._call)
        else:
            events += self._content.add(held)
        return events + self._content.rest()

    def _unread(self, call: JsonCall) -> list[Event]:
        """What stood between the markers and was no call is shown as it was."""
        if call.started:
            return []
        self._count -= 1
        return [Content(self._OPEN + call.raw + (self._CLOSE if call.done else ""))] if call.raw else []


class MistralTools:
    """[TOOL_CALLS][{...}, {...}], and the newer [TOOL_CALLS]name[ARGS]{...} for each call."""

    _OPEN, _ARGS = "[TOOL_CALLS]", "[ARGS]"

    def __init__(self) -> None:
        self._buffer = TextBuffer()
        self._content = ContentText()
        self._inside = False
        self._named = False
        self._call: JsonCall | None = None
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        self._buffer.add(text)
        events: list[Event] = []
        while True:
            if not self._inside:
                before, marker = self._buffer.take_until((self._OPEN,))
                events += self._content.add(before)
                if marker is None:
                    return events
                self._content.call()
                self._inside = True
            more, read_on = self._read_calls()
            events += more
            if not read_on:
                return events

    def finish(self) -> list[Event]:
        events = self._content.add(self._buffer.take_all()) if not self._inside else []
        return events + self._content.rest()

    def _read_calls(self) -> tuple[list[Event], bool]:
        """Events, and whether there may be more in the buffer."""
        if self._named:
            arguments, marker = self._buffer.take_until((self._OPEN,))
            events: list[Event] = [ToolArguments(self._count - 1, arguments)] if arguments else []
            self._named = marker is None
            return events, marker is not None
        if self._call is None:
            text = self._buffer.text.lstrip(" \n,[")
            if not text:
                return [], False
            if text[0] in "{]":
                self._buffer.text = text
                if text[0] == "]":
                    self._inside = False
                    self._buffer.text = text[1:]
                    return [], bool(text[1:])
                self._call = JsonCall(self._count)
                self._count += 1
            else:
                return self._read_name()
        events, rest = self._call.feed(self._buffer.take_all())
        self._buffer.add(rest)
        if self._call.done:
            self._call = None
        return events, bool(rest)

    def _read_name(self) -> tuple[list[Event], bool]:
        name, args, _ = self._buffer.text.partition(self._ARGS)
        if not args:
            return [], False
        self._buffer.text = self._buffer.text[len(name) + len(args) :]
        self._named, self._count = True, self._count + 1
        return [ToolStart(self._count - 1, new_call_id(), name.strip())], True


class DeepSeekTools:
    """DeepSeek's calls: V3 writes `function`, a separator, the name and a fenced JSON block, V3.1 the name, a
    separator and the JSON."""

    _ALL = "<｜tool▁calls▁begin｜>"
    _OPEN, _SEP, _CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    _END = "<｜tool▁calls▁end｜>"

    def __init__(self) -> None:
        self._buffer = TextBuffer()
        self._content = ContentText()
        self._state = "content"
        self._head = ""
        self._fenced = False
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        self._buffer.add(text)
        events: list[Event] = []
        while True:
            before = len(self._buffer.text), self._state
            events += getattr(self, f"_read_{self._state}")()
            if (len(self._buffer.text), self._state) == before or not self._buffer.text:
                return events

    def finish(self) -> list[Event]:
        held, events = self._buffer.take_all(), list[Event]()
        if self._state == "content":
            events += self._content.add(held)
        elif self._state == "arguments":
            events += self._arguments(held.removesuffix("```").rstrip() if self._fenced else held)
        return events + self._content.rest()

    def _read_content(self) -> list[Event]:
        before, marker = self._buffer.take_until((self._ALL, self._OPEN, self._END))
        events = self._content.add(before)
        if marker is not None:
            self._content.call()
        if marker == self._OPEN:
            self._state, self._head = "head", ""
        return events

    def _read_head(self) -> list[Event]:
        """`function` of V3, or the name of V3.1, up to the separator."""
        text, marker = self._buffer.take_until((self._SEP,))
        self._head += text
        if marker is None:
            return []
        if self._head.strip() == "function":
            self._state, self._head = "name", ""
            return []
        return self._start(self._head.strip(), fenced=False)

    def _read_name(self) -> list[Event]:
        text, marker = self._buffer.take_until(("```json\n", "```json"))
        self._head += text
        return [] if marker is None else self._start(self._head.strip(), fenced=True)

    def _read_arguments(self) -> list[Event]:
        ends = ("\n```" + self._CLOSE, "```" + self._CLOSE, self._CLOSE) if self._fenced else (self._CLOSE,)
        text, marker = self._buffer.take_until(ends)
        if marker is not None:
            self._state = "content"
        return self._arguments(text)

    def _start(self, name: str, *, fenced: bool) -> list[Event]:
        self._state, self._fenced, self._count = "arguments", fenced, self._count + 1
        return [ToolStart(self._count - 1, new_call_id(), name)]

    def _arguments(self, text: str) -> list[Event]:
        return [ToolArguments(self._count - 1, text)] if text else []
