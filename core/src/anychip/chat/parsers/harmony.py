"""GPT-OSS's harmony: messages on channels. `analysis` is reasoning, `final` the answer, and a message addressed to a
function is a call of it."""

from __future__ import annotations

import re
from typing import ClassVar

from anychip.chat.events import Event, OutputParser, Reasoning, ToolArguments, ToolStart, new_call_id
from anychip.chat.parsers.json_call import Brackets
from anychip.chat.parsers.reasoning import PlainText
from anychip.chat.parsers.scan import StateReader

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_OPENS = (_START, _CHANNEL, _MESSAGE)
_TO = r"to=(?P<to{0}>[\w.\-]*)"
_HEADER = re.compile(
    r"\s*(?:<\|start\|>\s*(?P<role>\w*))?\s*(?:" + _TO.format(1) + r")?\s*"
    r"(?:<\|channel\|>\s*(?P<channel>\w*))?\s*(?:" + _TO.format(2) + r")?\s*"
    r"(?:<\|constrain\|>)?\s*\w*\s*(?P<rest><\|message\|>|<[|\w]*)?"
)
_ROLE = "assistant"
_CHANNELS = ("analysis", "commentary", "final")
_MAX_HEADER = 256


class Harmony(StateReader):
    """Both kinds of parser in one: the format does not separate them. The prompt ends with <|start|>assistant. Text on
    the channel `final`, and text without a channel, is `rest`'s to read.

    The format's markers are special tokens, and are left out with the headers that they belong to. A text that is no
    header is the answer's."""

    end_marker: ClassVar[str] = "<|channel|>final<|message|>"

    def __init__(self, rest: OutputParser | None = None, *, inside: bool = False) -> None:
        super().__init__("between")
        # One Harmony over another is one: it reads the calls as well.
        self._rest: OutputParser = PlainText() if rest is None or isinstance(rest, Harmony) else rest
        self._arguments: Brackets | None = None
        self._begun = False  # a message was read
        self._count = 0
        self._index = 0  # of the newest call

    @classmethod
    def starts_inside(cls, prompt: str) -> bool:
        return prompt.rstrip().endswith(_START + _ROLE)

    def finish(self) -> list[Event]:
        held = self._buffer.take_all()
        cut_marker = any(marker.startswith(held.strip()) for marker in (*_OPENS, *_ENDS))
        if (self._state == "header" and _is_header(held)) or (self._state == "between" and self._begun and cut_marker):
            held = ""  # a header, or the marker of a message's end, that was cut
        match self._state:
            case "analysis":
                events: list[Event] = [Reasoning(held)] if held else []
            case "raw":
                events = [ToolArguments(self._index, held)] if held else []
            case "call":
                events = []
            case _:
                events = self._text(held)
        return events + self._number(self._rest.finish())

    def _read_between(self) -> list[Event]:
        """Where a message may begin: at the beginning, and after one."""
        text = self._buffer.text.lstrip()
        found = next((marker for marker in (*_OPENS, *_ENDS, "to=") if text.startswith(marker)), None)
        if found in _ENDS:
            self._buffer.text = text[len(found) :]
        elif found is not None:
            self._state = "header"
        elif not any(marker.startswith(text) for marker in (*_OPENS, *_ENDS, "to=")):
            self._state = "plain"
        return []

    def _read_plain(self) -> list[Event]:
        """Text outside of messages: a model that answers plainly."""
        before, marker = self._buffer.take_until((*_OPENS, *_ENDS))
        if marker in _ENDS:
            self._state = "between"
        elif marker is not None:
            self._buffer.text, self._state = marker + self._buffer.text, "header"
        return self._text(before)

    def _read_header(self) -> list[Event]:
        end = self._buffer.text.find(_MESSAGE)
        header = self._buffer.text[: end + len(_MESSAGE)] if end >= 0 else self._buffer.text
        if end < 0 and len(header) <= _MAX_HEADER and _is_header(header):
            return []
        if end >= 0 and _is_header(header):
            self._buffer.take(len(header))
            return self._open(header)
        self._state = "plain"
        space = len(header) - len(header.lstrip())
        first = next(marker for marker in (*_OPENS, "to=") if header.startswith(marker, space))
        return self._text(self._buffer.take(space + len(first)))

    def _open(self, header: str) -> list[Event]:
        found = _HEADER.fullmatch(header)
        assert found is not None
        self._begun = True
        name = (found["to1"] or found["to2"] or "").removeprefix("functions.")
        if name:
            self._state, self._index, self._count = "call", self._count, self._count + 1
            return [ToolStart(self._index, new_call_id(), name)]
        self._state = "analysis" if found["channel"] == "analysis" else "final"
        return []

    def _read_call(self) -> list[Event]:
        """The beginning of a call's arguments."""
        text = self._buffer.text.lstrip()
        if text.startswith("{"):
            self._buffer.text, self._state, self._arguments = text, "arguments", Brackets()
        elif text:
            self._state = "raw"
        return []

    def _read_arguments(self) -> list[Event]:
        assert self._arguments is not None
        text = self._buffer.take(self._arguments.take(self._buffer.text, 0))
        if self._arguments.done:
            self._state = "between"
        return [ToolArguments(self._index, text)]

    def _read_raw(self) -> list[Event]:
        text = self._body()
        return [ToolArguments(self._index, text)] if text else []

    def _read_analysis(self) -> list[Event]:
        text = self._body()
        return [Reasoning(text)] if text else []

    def _read_final(self) -> list[Event]:
        return self._text(self._body())

    def _body(self) -> str:
        """More of a message; the marker that ends it changes the state."""
        text, marker = self._buffer.take_until((*_ENDS, _START, _CHANNEL))
        if marker in _ENDS:
            self._state = "between"
        elif marker is not None:
            self._buffer.text, self._state = marker + self._buffer.text, "header"
        return text

    def _text(self, text: str) -> list[Event]:
        return self._number(self._rest.feed(text)) if text else []

    def _number(self, events: list[Event]) -> list[Event]:
        """Calls that `rest` found, counted with the others."""
        numbered: list[Event] = []
        for event in events:
            match event:
                case ToolStart(_, call_id, name):
                    self._index, self._count = self._count, self._count + 1
                    numbered.append(ToolStart(self._index, call_id, name))
                case ToolArguments(_, text):
                    numbered.append(ToolArguments(self._index, text))
                case _:
                    numbered.append(event)
        return numbered


def _is_header(text: str) -> bool:
    """Whether the text is a header, or the beginning of one."""
    found = _HEADER.fullmatch(text)
    if found is None:
        return False
    whole = found["rest"] == _MESSAGE
    role, channel = found["role"] or "", found["channel"]
    if whole or channel is not None:
        return role in ("", _ROLE) and (channel is None or _known_channel(channel, whole=whole))
    return _ROLE.startswith(role)


def _known_channel(channel: str, *, whole: bool) -> bool:
    return channel in _CHANNELS if whole else any(known.startswith(channel) for known in _CHANNELS)
