"""Reading text in pieces: markers that may be cut anywhere, and JSON objects while they grow."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from anychip.chat.events import Content, Event, ToolArguments, ToolStart, new_call_id


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

    def take_all(self) -> str:
        text, self.text = self.text, ""
        return text


def _overlap(text: str, marker: str) -> int:
    """How long a beginning of the marker the text ends with."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


class ContentText:
    """The answer's text around tool calls: white space next to a call belongs to the format and is left out."""

    def __init__(self) -> None:
        self._space = ""
        self._after_call = False

    def add(self, text: str) -> list[Event]:
        if self._after_call:
            text = text.lstrip()
        whole = self._space + text
        body = whole.rstrip()
        self._space = whole[len(body) :]
        if not body:
            return []
        self._after_call = False
        return [Content(body)]

    def call(self) -> None:
        """A tool call stands here."""
        self._space, self._after_call = "", True

    def rest(self) -> list[Event]:
        """The white space at the end, which no call followed."""
        text, self._space = self._space, ""
        return [Content(text)] if text else []


class JsonCall:
    """Reads {"name": ..., "arguments": {...}} while it grows; "parameters" is the same as "arguments". The arguments
    are given out as they are written, once the name is known."""

    _ARGUMENTS = ("arguments", "parameters")

    def __init__(self, index: int) -> None:
        self.index = index
        self.done = False
        self.name: str | None = None
        self.raw = ""
        self._depth = 0
        self._string = self._escaped = False
        self._key: str | None = None  # at depth 1, once its colon has come
        self._token = ""  # the string or scalar that is being read at depth 1
        self._last_string = ""
        self._in_arguments = False
        self._held = ""
        self._any_arguments = False
        self.started = False
        """Whether the call has been given out."""

    def feed(self, text: str) -> tuple[list[Event], str]:
        """Events, and the text that follows the object."""
        out: list[str] = []
        for at, character in enumerate(text):
            self._step(character, out)
            if self.done:
                self.raw += text[: at + 1]
                return self._give(out), text[at + 1 :]
        self.raw += text
        return self._give(out), ""

    def _step(self, character: str, out: list[str]) -> None:
        if self._string:
            self._in_string(character, out)
        elif self._in_arguments and self._depth == 1 and character in ",}":
            self._end_value(character)
        else:
            self._outside(character, out)

    def _in_string(self, character: str, out: list[str]) -> None:
        if self._in_arguments:
            out.append(character)
        elif self._depth == 1:
            self._token += character
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._string = False
            if self._depth == 1 and not self._in_arguments:
                self._last_string = _decoded(self._token)
                if self._key == "name":
                    self.name = self._last_string

    def _outside(self, character: str, out: list[str]) -> None:
        if self._in_arguments and not (self._depth == 1 and character.isspace()):
            out.append(character)
        if character == '"':
            self._string, self._token = True, '"'
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.done = self._depth <= 0
        elif self._depth == 1 and character == ":" and not self._in_arguments:
            self._key = self._last_string
            self._in_arguments = self._key in self._ARGUMENTS
            self._any_arguments = self._any_arguments or self._in_arguments
        elif self._depth == 1 and character == ",":
            self._key = None

    def _end_value(self, character: str) -> None:
        self._in_arguments, self._key = False, None
        if character == "}":
            self._depth -= 1
            self.done = True

    def _give(self, out: list[str]) -> list[Event]:
        events: list[Event] = []
        self._held += "".join(out)
        if self.name is None:
            return events
        if not self.started:
            self.started = True
            events.append(ToolStart(self.index, new_call_id(), self.name))
        if self.done and not self._any_arguments:
            self._held = "{}"
        if self._held:
            events.append(ToolArguments(self.index, self._held))
            self._held = ""
        return events


def _decoded(quoted: str) -> str:
    try:
        return msgspec.json.decode(quoted.encode(), type=str)
    except msgspec.DecodeError:
        return quoted.strip('"')
