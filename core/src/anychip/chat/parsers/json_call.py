"""JSON that grows: where a value ends, and calls written as objects."""

from __future__ import annotations

import re

import msgspec

from anychip.chat.events import Event, ToolArguments, ToolStart, new_call_id


class Brackets:
    """Finds the end of a text in brackets, or of a string, while it grows. Brackets in strings do not count, nor do
    quotes after a backslash; what else stands inside is not looked at."""

    def __init__(self, *, opening: str = "{[", closing: str = "}]", quotes: str = '"') -> None:
        self.done = False
        self._opening = opening
        self._quotes = quotes
        self._outside = re.compile("[" + re.escape(opening + closing + quotes) + "]")
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def take(self, text: str, at: int) -> int:
        """Where in the text, from `at` on, the value ends; its length if it does not."""
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            hit = (_IN_STRING[self._quote] if self._quote else self._outside).search(text, at)
            if hit is None:
                return len(text)
            at = hit.end()
            self._pass(hit[0])
            if self.done:
                return at
        return at

    def _pass(self, character: str) -> None:
        if self._quote:
            if character == "\\":
                self._escaped = True
                return
            self._quote = ""
        elif character in self._quotes:
            self._quote = character
        else:
            self._depth += 1 if character in self._opening else -1
        self.done = not self._quote and self._depth <= 0


_IN_STRING = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}


class _Scalar:
    """Finds the end of a number or word."""

    _TEXT = re.compile(r"[-+.\w]*")

    def __init__(self) -> None:
        self.done = False

    def take(self, text: str, at: int) -> int:
        hit = self._TEXT.match(text, at)
        end = at if hit is None else hit.end()
        self.done = end < len(text)
        return end


class JsonCall:
    """Reads {"name": ..., "arguments": {...}} while it grows; "parameters" is the same as "arguments". The call is
    given out once its name is known and its arguments have begun, and then the arguments as they are written. They are
    the object that a string holds where the model wrote them as a string, and an empty object where it wrote null.

    `bare`: an object without arguments is a call too. `over`: the object has ended, or cannot be one.
    """

    _ARGUMENTS = ("arguments", "parameters")

    def __init__(self, index: int, *, bare: bool) -> None:
        self.index = index
        self.over = False
        self.started = False
        """Whether the call has been given out."""
        self.name = ""
        """What is known of the name."""
        self._bare = bare
        self._raw: list[str] = []
        self._expected = "object"
        self._key = ""
        self._value: Brackets | _Scalar | None = None  # the value, or key, that is being read
        self._token: list[str] = []  # its text
        self._in_arguments = self._any_arguments = False
        self._streams = False  # arguments that are given out as they are written
        self._out: list[str] = []  # arguments that were not given out

    @property
    def failed(self) -> bool:
        """Whether it was no call: `raw` is to be shown as it was."""
        return self.over and not self.started

    @property
    def raw(self) -> str:
        """All the text, of a call that has not started."""
        return "".join(self._raw)

    def feed(self, text: str) -> tuple[list[Event], str]:
        """Events, and the text that follows the object."""
        at = 0
        started = self.started
        while at < len(text) and not self.over:
            at = self._step(text, at) if self._value is None else self._read(text, at)
        if not started:
            self._raw.append(text[:at])
        return self._give(new=self.started and not started), text[at:]

    def finish(self) -> list[Event]:
        """What is left of a started call that was cut."""
        if self._in_arguments and not self._streams:
            self._out += self._token
        return self._give(new=False) if self.started else []

    def known_name(self) -> str:
        """The name, or the part of it that has come."""
        if self._expected == "value" and self._key == "name" and not self.name:
            return "".join(self._token)[1:]
        return self.name

    def _step(self, text: str, at: int) -> int:
        """One character between keys and values."""
        character = text[at]
        if character.isspace():
            return at + 1
        if self._expected == "value":
            return self._begin_value(character, at)
        match self._expected, character:
            case "object", "{":
                self._expected = "key"
            case "key", '"':
                self._value = Brackets()
                return at
            case "colon", ":":
                self._expected = "value"
            case "next", ",":
                self._expected = "key"
            case (("key" | "next"), "}"):
                self._end()
            case _:
                self.over = True
                return at
        return at + 1

    def _begin_value(self, character: str, at: int) -> int:
        if character in '"{[':
            self._value = Brackets()
        elif character in "-+." or character.isalnum():
            self._value = _Scalar()
        else:
            self.over = True
            return at
        if self._key in self._ARGUMENTS and not self._any_arguments:
            self._in_arguments = self._any_arguments = True
            self._streams = character in "{["
            self.started = bool(self.name)
        return at

    def _read(self, text: str, at: int) -> int:
        assert self._value is not None
        end = self._value.take(text, at)
        (self._out if self._streams else self._token).append(text[at:end])
        if self._value.done:
            self._end_value()
        return end

    def _end_value(self) -> None:
        token, self._token, self._value = "".join(self._token), [], None
        if self._expected == "key":
            self._key, self._expected = _decoded(token) or "", "colon"
            return
        self._expected = "next"
        if self._in_arguments:
            if not self._streams:
                self._out.append(_as_object(token))
            self._in_arguments = self._streams = False
        elif self._key == "name" and not self.name:
            self.name = _decoded(token) or ""
            self.started = bool(self.name) and self._any_arguments

    def _end(self) -> None:
        self.over = True
        if self.name and self._bare and not self._any_arguments:
            self.started = True
            self._out.append("{}")

    def _give(self, *, new: bool) -> list[Event]:
        if not self.started:
            return []
        events: list[Event] = [ToolStart(self.index, new_call_id(), self.name)] if new else []
        arguments, self._out = "".join(self._out), []
        return [*events, ToolArguments(self.index, arguments)] if arguments else events


def _decoded(quoted: str) -> str | None:
    """A JSON string's text; None for what is none."""
    try:
        return msgspec.json.decode(quoted.encode(), type=str)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None


def _as_object(token: str) -> str:
    """Arguments that are no object as they were written: the object that a string holds, an empty one for null and for
    a string that says nothing."""
    text = token if token == "null" else _decoded(token)
    if text is not None and text.strip() in ("", "null"):
        return "{}"
    try:
        return token if text is None or not isinstance(msgspec.json.decode(text.encode()), dict) else text
    except (msgspec.DecodeError, RecursionError):
        return token
