"""Finds stop strings in text that comes in pieces. Does not know tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Text goes in as it is made and comes out once no stop string can begin in it. What is kept in between is
    shorter than the longest stop string, however long the text is."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        """`stops` holds one at least; `include_stop` leaves the stop string at the text's end."""
        self._stops = stops
        self._include_stop = include_stop
        self._max_held = max(map(len, stops)) - 1
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text: the one that ends first, and of several that end together the one that
        was named first."""

    def add(self, text: str, *, may_stop: bool) -> str:
        """New text, and what can be given out by now. `may_stop` False: a stop string that ends in this text does not
        count. After a stop string was found, what is returned is the text's end."""
        whole = self._held + text
        if may_stop and (at := self._first(whole, len(self._held))) is not None:
            self._held = ""
            return whole[:at]
        end = max(0, len(whole) - self._max_held)
        self._held = whole[end:]
        return whole[:end]

    def rest(self) -> str:
        """What was held back, once the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _first(self, whole: str, known: int) -> int | None:
        """Where the text is cut. A stop string must end after the first `known` characters."""
        found: list[tuple[int, str]] = []
        for stop in self._stops:
            at = whole.find(stop, max(0, known - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), stop))
        if not found:
            return None
        end, self.found = min(found, key=lambda hit: hit[0])
        return end if self._include_stop else end - len(self.found)
