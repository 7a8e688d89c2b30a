"""How many graphs a device's streams allow. Every graph takes some for itself; a device that has none left ends a
capture with error 207008, and the process with it. So the device is asked before. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_KEPT = 64
"""Streams that are left alone: the runtime's own, the allocator's, HCCL's."""

_PER_GRAPH = 1
_PER_GROUP = 2
"""Streams of a graph, and for each group of ranks that it calls: a first guess, until a capture shows more."""


class StreamBudget:
    """`left` asks the runtime; None from it: nobody knows, and `total` less what was captured stands for it.
    `most_sizes` is how many captures there may be at all."""

    def __init__(self, left: Callable[[], int | None], total: int, most_sizes: int | None = None) -> None:
        self._left = left
        self._total = total
        self._most = most_sizes
        self._taken = 0
        self._per_graph = _PER_GRAPH

    def num_sizes(self, per_size: int = 1) -> int:
        """Captures of so many graphs each that fit now."""
        fitting = max(0, (self.left() - _KEPT) // (per_size * self._per_graph))
        return fitting if self._most is None else min(fitting, self._most)

    def left(self) -> int:
        known = self._left()
        return self._total - self._taken if known is None else known

    def short_of(self, graphs: int, *, num_groups: int = 0) -> str:
        """Why so many graphs, which call so many groups of ranks, are not to be captured; "" where they are."""
        needed = graphs * (self._per_graph + _PER_GROUP * num_groups)
        left = self.left()
        if needed > left - _KEPT:
            return f"{graphs} graphs take {needed} streams, the device has {left}, of which {_KEPT} are kept free"
        return ""

    @contextmanager
    def spent(self, graphs: int = 1) -> Iterator[None]:
        """Around the capture of so many graphs: learns what one took."""
        before = self._left()
        yield
        after = self._left()
        self._taken += graphs * self._per_graph
        if before is not None and after is not None and before > after:
            self._per_graph = max(self._per_graph, -(-(before - after) // graphs))
