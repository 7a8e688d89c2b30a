"""Tool calls that are the whole output: Llama's JSON, Llama's Python, a JSON list, one call's arguments."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence

from anychip.chat.events import Event, ToolArguments, ToolStart, new_call_id
from anychip.chat.parsers.json_call import Brackets, JsonCall
from anychip.chat.parsers.scan import SPACE, GrowingCall, Head, Parts
from anychip.chat.parsers.whole_output import WholeOutputTools

_SEPARATORS = re.compile(r"[\s;,]{0,256}")


class LlamaJsonTools(WholeOutputTools):
    """{"name": ..., "parameters": {...}}, several with ";" between them, perhaps after <|python_tag|>."""

    _BEGINNINGS: Sequence[Parts] = ((SPACE, "{"), (SPACE, "<|python_tag|>", SPACE, "{"))
    _BETWEEN: Sequence[Parts] = ((_SEPARATORS, "{"),)
    _ENDS: Sequence[Parts] = ()
    _CALL = "{"


class JsonListTools(LlamaJsonTools):
    """[{"name": ..., "parameters": {...}}, ...] or such objects without a list: what a model without a format of its
    own is asked for."""

    _BEGINNINGS = ((SPACE, "{"), (SPACE, "[", SPACE, "{"))
    _ENDS = ((_SEPARATORS, "]"),)

    def __init__(self) -> None:
        super().__init__()
        self._listed = False

    def _call_begins(self, head: Head) -> int:
        self._listed = self._listed or (not self._count and "[" in self._buffer.text[: head.end])
        return super()._call_begins(head)

    def _ends(self) -> Sequence[Parts]:
        return self._ENDS if self._listed else ()


class ForcedCalls(JsonListTools):
    """A list of calls that the grammar forces, of the functions with these names. A call that is cut before its name
    is whole is given out, without arguments, where only one function can be meant."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names

    def finish(self) -> list[Event]:
        call = self._call
        begun = self._state == "head" and not self._count and bool(self._buffer.text.strip())
        if isinstance(call, JsonCall):
            begun = not call.started
        known = call.known_name() if isinstance(call, JsonCall) else ""
        meant = [name for name in self._names if name.startswith(known)]
        if known in meant and isinstance(call, JsonCall) and call.name:
            meant = [known]
        if begun and len(meant) == 1:
            return [ToolStart(self._count, new_call_id(), meant[0])]
        return super().finish()


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


_PYTHON_NAME = re.compile(r"[^\W\d][\w.]{0,255}")
_COMMA = re.compile(r"\s{0,256},?\s{0,256}")


class PythonicTools(WholeOutputTools):
    """[name(argument=value, ...), ...], the values literals of Python or JSON. A call is given out when it is whole."""

    _BEGINNINGS: Sequence[Parts] = ((SPACE, "[", SPACE, _PYTHON_NAME, SPACE, "("),)
    _BETWEEN: Sequence[Parts] = ((SPACE, ",", SPACE, _PYTHON_NAME, SPACE, "("),)
    _ENDS: Sequence[Parts] = ((_COMMA, "]"),)
    _CALL = "("

    def _call_begins(self, head: Head) -> int:
        return self._buffer.text.rindex(head.names[-1], 0, head.end)

    def _new_call(self) -> GrowingCall:
        return PythonCall(self._count)


class PythonCall:
    """One call, from its name to its closing parenthesis."""

    def __init__(self, index: int) -> None:
        self.over = self.started = False
        self._index = index
        self._brackets = Brackets(opening="([{", closing=")]}", quotes="\"'")
        self._raw: list[str] = []

    @property
    def failed(self) -> bool:
        return self.over and not self.started

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def feed(self, text: str) -> tuple[list[Event], str]:
        end = self._brackets.take(text, 0)
        self._raw.append(text[:end])
        self.over = self._brackets.done
        found = _python_call(self.raw) if self.over else None
        if found is None:
            return [], text[end:]
        self.started = True
        name, arguments = found
        return [ToolStart(self._index, new_call_id(), name), ToolArguments(self._index, arguments)], text[end:]

    def finish(self) -> list[Event]:
        return []


class _JsonNames(ast.NodeTransformer):
    """Models that know both languages write true, false and null as JSON does."""

    _VALUES: Mapping[str, bool | None] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self._VALUES[node.id]) if node.id in self._VALUES else node


def _python_call(source: str) -> tuple[str, str] | None:
    """A call's name and its arguments as JSON; None where it is no call of literals."""
    try:
        call = ast.parse(source, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            return None
        arguments = {str(word.arg): ast.literal_eval(_JsonNames().visit(word.value)) for word in call.keywords}
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
        return ast.unparse(call.func), text
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
