"""Counts the tokens of a row that enters its slot, for penalties."""

from __future__ import annotations

import numpy as np

from anychip.plugin_api import DRAWN, IN_PROMPT


class TokenCounter:
    """Counts a row's tokens as EnteringRow has them, in time that grows with the row alone."""

    def __init__(self, vocab_size: int) -> None:
        self._place = np.zeros(vocab_size, dtype=np.int64)  # by token: a place of the row where it stands
        self._counts = np.zeros(vocab_size, dtype=np.int32)

    def count(self, ids: np.ndarray, num_prompt: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct ids of a row [num_ids] int32 and their counts; the first `num_prompt` are its prompt."""
        places = np.arange(len(ids))
        self._place[ids] = places
        distinct = ids[self._place[ids] == places]
        self._counts[distinct] = 0
        self._counts[ids[:num_prompt]] = IN_PROMPT
        np.add.at(self._counts, ids[num_prompt:], DRAWN)
        return distinct, self._counts[distinct]
