"""Of which tokens the draft model has keys and values: by block, for who finds the block later, and by slot.

The target's blocks hold both models' pages, and the draft model may not have computed what the target has. Does not run
anything: worker/draft_runner does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from anychip.types import NULL_BLOCK


class Coverage:
    """`tables` [max_slots, num_pages] are the slots' blocks, each of `block_size` tokens."""

    def __init__(self, *, max_slots: int, num_pages: int, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.tables = np.zeros((max_slots, num_pages), dtype=np.int32)
        self.computed = np.zeros(max_slots, dtype=np.int32)
        """By slot: its first tokens, whose pages are right."""
        self.reached = np.zeros(max_slots, dtype=np.int32)
        """By slot: tokens whose pages were written, the last of them for guesses."""
        self._written = np.zeros(num_blocks, dtype=np.int32)  # by block: its first tokens, whose pages are right
        self._written[NULL_BLOCK] = block_size  # stands where a window has passed: nothing is missing there

    def blocks_change(self, copies: Sequence[tuple[int, int]], fresh: Iterable[int]) -> None:
        """Copies (source, destination) in order, and blocks that were handed out for new tokens, destinations perhaps
        among them. What a source held until now counts, even if it is handed out in the same step."""
        held: dict[int, int] = {}
        for source, destination in copies:
            held[destination] = held.get(source, int(self._written[source]))
        for block in fresh:
            self._written[block] = 0
        for block, count in held.items():
            self._written[block] = count

    def enter(self, slot: int, table: Sequence[int], num_shared: int) -> int:
        """A row takes the slot with these blocks, in which others computed its first `num_shared` tokens. Returns how
        many of those the draft model has."""
        self.tables[slot, : len(table)] = table
        self.tables[slot, len(table) :] = NULL_BLOCK
        shared = self._written[np.asarray(table[: -(-num_shared // self.block_size)], dtype=np.int64)]
        short = np.flatnonzero(shared < self.block_size)
        count = num_shared
        if len(short):
            count = min(num_shared, int(short[0]) * self.block_size + int(shared[short[0]]))
        self.computed[slot] = self.reached[slot] = count
        return count

    def take(self, slots: np.ndarray, places: np.ndarray, blocks: np.ndarray) -> None:
        """Blocks come into the slots' tables: new ones, copies in place of shared ones, and new ones where a block that
        was written for guesses was given back."""
        self.tables[slots, places] = blocks
        held = places * self.block_size + self._written[blocks]
        np.minimum.at(self.computed, slots, held)
        np.minimum.at(self.reached, slots, held)

    def computes(self, slots: np.ndarray, ends: np.ndarray) -> None:
        """The slots' tokens up to `ends` are computed, each slot once."""
        starts, self.computed[slots] = self.computed[slots], ends
        self.reached[slots] = ends
        first, last = starts // self.block_size, (ends - 1) // self.block_size
        self._written[self.tables[slots, last]] = ends - last * self.block_size
        for at in np.flatnonzero(last > first).tolist():
            self._written[self.tables[slots[at], first[at] : last[at]]] = self.block_size
        self._written[NULL_BLOCK] = self.block_size
