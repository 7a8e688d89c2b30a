"""Tool calls that are the whole output: Llama's JSON, Llama's Python, a JSON list, one call's arguments."""

from __future__ import annotations

import ast
import json

from anychip.chat.events import Content, Event, ToolArguments, ToolStart, new_call_id
from anychip.chat.parsers.scan import JsonCall, TextBuffer


class LlamaJsonTools:
    """{"name": ..., "parameters": {...}}, several with ";" between them, perhaps after <|python_tag|>. Output that
    does not begin like that is the answer; so is an object that has no name."""

    _TAG = "<|python_tag|>"
    _BETWEEN = " \n\t;,"
    _OPENS_LIST = False

    def __init__(self) -> None:
        self._buffer = TextBuffer()
        self._state = "before"
        self._call: JsonCall | None = None
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        if self._state == "answer":
            return [Content(text)] if text else []
        self._buffer.add(text)
        if self._state == "before" and not self._enter():
            return []
        return self._read()

    def finish(self) -> list[Event]:
        held = self._buffer.take_all()
        if self._call is not None and not self._call.started:
            return [Content(self._call.raw + held)]
        if self._state == "calls":  # what surrounds the calls is the format's
            return []
        return [Content(held)] if held else []

    def _enter(self) -> bool:
        """Whether it is settled what the output is."""
        text = self._buffer.text.lstrip()
        if text.startswith(self._TAG):
            text = text[len(self._TAG) :].lstrip()
        elif self._TAG.startswith(text):
            return False
        if self._OPENS_LIST and text.startswith("["):
            text = text[1:].lstrip()
        if not text:
            return False
        if text[0] == "{":
            self._state, self._buffer.text = "calls", text
        else:
            self._state = "answer"
        return True

    def _read(self) -> list[Event]:
        if self._state == "answer":
            return [Content(self._buffer.take_all())]
        events: list[Event] = []
        while text := self._buffer.take_all():
            if self._call is None:
                text = text.lstrip(self._BETWEEN)
                if not text.startswith("{"):
                    self._buffer.text = text
                    return events
                self._call = JsonCall(self._count)
            more, rest = self._call.feed(text)
            self._buffer.text = rest
            events += more
            if self._call.done:
                if not self._call.started:
                    text, self._call, self._state = self._call.raw + self._buffer.take_all(), None, "answer"
                    return [*events, Content(text)]
                self._call, self._count = None, self._count + 1
        return events


class JsonListTools(LlamaJsonTools):
    """[{"name": ..., "parameters": {...}}, ...] or a single such object: what a forced call is constrained to, and
    what a model without a format of its own is asked for."""

    _BETWEEN = " \n\t;,]"
    _OPENS_LIST = True


class ArgumentsOnly:
    """The whole output is the arguments of one function that the request named."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Event]:
        if not text:
            return []
        events: list[Event] = []
        if self._name is not None:
            events.append(ToolStart(0, new_call_id(), self._name))
            self._name = None
        return [*events, ToolArguments(0, text)]

    def finish(self) -> list[Event]:
        return []


class PythonicTools:
    """[name(argument=value, ...), ...] as Llama 3.2 and 4 write it; each call is given out when it is whole."""

    def __init__(self) -> None:
        self._text = ""
        self._state = "before"
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        if self._state == "answer":
            return [Content(text)] if text else []
        self._text += text
        if self._state == "before":
            begun = self._text.lstrip()
            if not begun:
                return []
            if begun[0] != "[" or (len(begun) > 1 and not (begun[1].isidentifier() or begun[1].isspace())):
                self._state = "answer"
                return self._flush()
            if len(begun) == 1:
                return []
            self._state, self._text = "calls", begun[1:]
        return self._read()

    def finish(self) -> list[Event]:
        if self._state == "before" or not self._count:
            self._text = "[" * (self._state == "calls") + self._text
            return self._flush()
        return []

    def _flush(self) -> list[Event]:
        text, self._text = self._text, ""
        return [Content(text)] if text else []

    def _read(self) -> list[Event]:
        events: list[Event] = []
        while (end := _call_end(self._text)) is not None:
            source = self._text[:end].lstrip(" \n\t,")
            found = _python_call(source)
            if found is None:
                break
            self._text = self._text[end:]
            name, arguments = found
            events += [ToolStart(self._count, new_call_id(), name), ToolArguments(self._count, arguments)]
            self._count += 1
        return events


def _call_end(text: str) -> int | None:
    """Where the first call's closing parenthesis has passed."""
    depth, quote, escaped = 0, "", False
    for at, character in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0 and character == ")":
                return at + 1
            if depth < 0:
                return None
    return None


def _python_call(source: str) -> tuple[str, str] | None:
    """A call's name and its arguments as JSON; None where it is no call of literals."""
    try:
        call = ast.parse(source, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
        return ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
