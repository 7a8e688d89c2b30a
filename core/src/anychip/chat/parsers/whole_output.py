"""Outputs that are calls from their beginning, or no calls at all."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.chat.events import Event
from anychip.chat.parsers.json_call import JsonCall
from anychip.chat.parsers.scan import ContentText, GrowingCall, Head, Parts, StateReader, match_head, read_call


class WholeOutputTools(StateReader):
    """Output that begins with a call is calls, with text after them. All other output is the answer, unchanged; so is
    whatever follows the calls and is none.

    Subclasses say how the output begins, what stands between two calls and after the last, and how a call is read. A
    head ends with `_CALL`, which is the call's own beginning."""

    _BEGINNINGS: Sequence[Parts]
    _BETWEEN: Sequence[Parts]
    _ENDS: Sequence[Parts]
    _CALL: str

    def __init__(self) -> None:
        super().__init__("head")
        self._content = ContentText()
        self._lead = ""  # what stands before the call that is being read
        self._call: GrowingCall | None = None
        self._count = 0

    def finish(self) -> list[Event]:
        held = self._buffer.take_all()
        if self._call is not None and self._call.started:
            return self._call.finish()
        if self._call is not None:
            held = self._lead + self._call.raw + held
        elif self._count and self._state == "head" and not held.strip(" \t\r\n,;"):
            held = ""  # what separates calls
        return self._content.add(held) + self._content.rest()

    def _new_call(self) -> GrowingCall:
        return JsonCall(self._count, bare=False)

    def _read_answer(self) -> list[Event]:
        return self._content.add(self._buffer.take_all())

    def _read_head(self) -> list[Event]:
        head = match_head(self._buffer.text, *(self._BETWEEN if self._count else self._BEGINNINGS))
        if head.verdict == "yes":
            self._lead = self._buffer.take(self._call_begins(head))
            self._call, self._state = self._new_call(), "call"
        elif self._count:
            end = match_head(self._buffer.text, *self._ends())
            if end.verdict == "yes":
                self._buffer.take(end.end)
            if "more" not in (head.verdict, end.verdict) or end.verdict == "yes":
                self._state = "answer"
        elif head.verdict == "no":
            self._state = "answer"
        return []

    def _call_begins(self, head: Head) -> int:
        return head.end - len(self._CALL)

    def _ends(self) -> Sequence[Parts]:
        return self._ENDS

    def _read_call(self) -> list[Event]:
        assert self._call is not None
        events = read_call(self._call, self._lead, self._buffer, self._content)
        if self._call.failed:
            self._call, self._state = None, "answer"
        elif self._call.over:
            self._call, self._state, self._count = None, "head", self._count + 1
        return events
