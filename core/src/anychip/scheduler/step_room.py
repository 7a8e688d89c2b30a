"""What is left of one step under the configuration's budget and the device's rules."""

from __future__ import annotations

from typing import Literal

import numpy as np

from anychip.errors import ConfigError
from anychip.worker_report import DeviceRules

Rows = Literal["any", "one token", "more tokens"]


class StepRoom:
    """A row is a prefill when its request is behind by more than its newest token. `rows` says which rows the step may
    hold, by the tokens that they compute. One object serves one step."""

    __slots__ = ("_longest", "_multiple", "_padded", "num_rows", "prefills_left", "rows", "rows_left", "tokens_left")

    def __init__(self, rules: DeviceRules, max_tokens: int, max_rows: int, rows: Rows = "any") -> None:
        self.tokens_left = max_tokens if rules.max_tokens is None else min(max_tokens, rules.max_tokens)
        self.rows_left = max_rows if rules.max_rows is None else min(max_rows, rules.max_rows)
        self.prefills_left = max_rows if rules.max_prefills is None else rules.max_prefills
        self.num_rows = 0
        self.rows = rows
        self._multiple = rules.chunk_multiple
        self._padded = rules.max_padded_tokens
        self._longest = 1

    @property
    def is_full(self) -> bool:
        return self.tokens_left <= 0 or self.rows_left <= 0

    @property
    def num_ones(self) -> int:
        """How many rows of one token fit an empty step: as many as `grant` would give their token, one by one."""
        if self.rows == "more tokens":
            return 0
        fit = min(self.tokens_left, self.rows_left)
        return fit if self._padded is None else min(fit, self._padded)

    def take_ones(self, count: int) -> None:
        """Takes so many rows of one token at once."""
        self.tokens_left -= count
        self.rows_left -= count
        self.num_rows += count

    def grant(self, behind: int) -> int:
        """How many of `behind` tokens a row may compute now; 0: none. Nothing is taken yet."""
        if self.rows_left <= 0 or (behind > 1 and self.prefills_left <= 0):
            return 0
        granted = min(behind, self.tokens_left)
        if self._padded is not None:
            granted = min(granted, self._padded // (self.num_rows + 1))
            if (self.num_rows + 1) * max(self._longest, granted) > self._padded:
                return 0
        if granted < behind and self._multiple > 1:
            granted -= granted % self._multiple
        if self.rows != "any" and (granted == 1) != (self.rows == "one token"):
            return 0
        return granted

    def ending(self, granted: int, stop: int) -> int:
        """How many of `granted` tokens a chunk has that should end behind `stop` of them: `stop`, where it is one of
        them and the device takes such a chunk."""
        return stop if 1 < stop < granted and stop % self._multiple == 0 else granted

    def grant_drafts(self, wanted: np.ndarray) -> np.ndarray:
        """How many of the drafts that they want one-token rows may have, [num_rows] both; earlier rows first. Nothing
        is taken yet."""
        if self.rows != "any":
            return np.zeros_like(wanted)
        if self._padded is None and wanted.sum() <= self.tokens_left and len(wanted) <= self.prefills_left:
            return wanted
        if self._padded is not None:
            wanted = np.minimum(wanted, max(0, self._padded // self.num_rows - 1))
        before = np.cumsum(wanted) - wanted
        granted: np.ndarray = np.minimum(wanted, np.maximum(0, self.tokens_left - before))
        granted[np.cumsum(granted > 0) > self.prefills_left] = 0
        return granted

    def take_drafts(self, lengths: np.ndarray) -> None:
        """Rows of one token get so many more, 1 at least; [num_rows]."""
        self.tokens_left -= int(lengths.sum())
        self.prefills_left -= len(lengths)
        self._longest = max(self._longest, 1 + int(lengths.max()))

    def take(self, tokens: int, *, prefill: bool) -> None:
        self.tokens_left -= tokens
        self.rows_left -= 1
        self.num_rows += 1
        if prefill:
            self.prefills_left -= 1
        if tokens > self._longest:
            self._longest = tokens


def check_rules(rules: DeviceRules, max_tokens: int, max_rows: int) -> None:
    """Raises ConfigError for rules and limits under which some request could never be computed."""
    limits = {
        "max_num_batched_tokens": max_tokens,
        "max_num_seqs": max_rows,
        "the device's max_tokens": rules.max_tokens,
        "the device's max_rows": rules.max_rows,
        "the device's max_prefills": rules.max_prefills,
        "the device's max_padded_tokens": rules.max_padded_tokens,
        "the device's chunk_multiple": rules.chunk_multiple,
    }
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; no step could hold anything, it must be 1 or more")
    largest = min(
        (value, name)
        for name, value in limits.items()
        if name in ("max_num_batched_tokens", "the device's max_tokens", "the device's max_padded_tokens")
        and value is not None
    )
    if rules.chunk_multiple > largest[0]:
        raise ConfigError(
            f"the device computes prompts in chunks of a multiple of {rules.chunk_multiple} tokens, and a step holds "
            f"{largest[0]} at most ({largest[1]}); raise that to {rules.chunk_multiple} or more"
        )
