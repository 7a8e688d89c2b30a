"""Text as tokens arrive: a piece is given out once its bytes are whole characters."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from anychip.tokenizer.tokenizer import Tokenizer

_CONTEXT = 6
"""Prompt tokens that the first output is decoded after, so that its leading space is right."""


class Detokenizer:
    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._raw = tokenizer.raw
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(ids=list(prompt_token_ids[-_CONTEXT:]), skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        text = ""
        for token_id in token_ids:
            piece = self._stream.step(self._raw, token_id)
            if piece is None:
                self._held.append(token_id)
            else:
                self._held.clear()
                text += piece
        return text

    def rest(self) -> str:
        """What is left of a character that never became whole."""
        return self._tokenizer.decode(self._held, skip_special_tokens=self._skip_special_tokens) if self._held else ""
