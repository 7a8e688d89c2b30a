"""What is left of one step under the configuration's budget and the device's rules."""

from __future__ import annotations

from anychip.messages import DeviceRules


class StepRoom:
    """A row is a prefill when it computes more than its newest token. One object serves one step."""

    __slots__ = ("_longest", "_multiple", "_padded", "num_rows", "prefills_left", "rows_left", "tokens_left")

    def __init__(self, rules: DeviceRules, max_tokens: int, max_rows: int) -> None:
        self.tokens_left = min(max_tokens, rules.max_tokens or max_tokens)
        self.rows_left = min(max_rows, rules.max_rows or max_rows)
        self.prefills_left = max_rows if rules.max_prefills is None else rules.max_prefills
        self.num_rows = 0
        self._multiple = rules.chunk_multiple
        self._padded = rules.max_padded_tokens
        self._longest = 1

    def grant(self, behind: int, *, prefill: bool) -> int:
        """How many of `behind` tokens a row may compute now; 0: none. Nothing is taken yet."""
        if self.rows_left <= 0 or (prefill and self.prefills_left <= 0):
            return 0
        granted = min(behind, self.tokens_left)
        if self._padded is not None:
            granted = min(granted, self._padded // (self.num_rows + 1))
            if (self.num_rows + 1) * max(self._longest, granted) > self._padded:
                return 0
        if granted < behind and self._multiple > 1:
            granted -= granted % self._multiple
        return granted

    def take(self, tokens: int, *, prefill: bool) -> None:
        self.tokens_left -= tokens
        self.rows_left -= 1
        self.num_rows += 1
        if prefill:
            self.prefills_left -= 1
        if tokens > self._longest:
            self._longest = tokens
