"""Text as tokens arrive: a piece is given out once its bytes are whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from anychip.tokenizer.token_bytes import TokenBytes
from anychip.tokenizer.tokenizer import Tokenizer

_CONTEXT = 6
"""Prompt tokens that the first output is decoded after, so that its leading space is right, and a character that
prompt and output share becomes whole."""

_MAX_HELD = 16
"""Tokens that a window holds for a character to become whole; none has that many."""


class Detokenizer:
    """The text of one sequence. Bytes that are no UTF-8 become U+FFFD, one for each longest part of a character, as
    the Unicode standard recommends. No ids raise: those that the tokenizer does not know have no text."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        start = max(len(prompt_token_ids) - _CONTEXT, 0)
        while start > 0 and not tokenizer.is_shown(prompt_token_ids[start], skip_special_tokens):
            start -= 1
        context = prompt_token_ids[start:]
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes = tokenizer.shown_bytes if skip_special_tokens else tokenizer.all_bytes
        self._early: _Beginning | _Window | None
        if tokenizer.known_bytes is None:
            self._early = _Window(tokenizer, context, skip_special_tokens=skip_special_tokens)
        else:
            self._early = _Beginning(tokenizer, tokenizer.known_bytes, self._utf8, skip_special_tokens)
            self._early.take_context(context)

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        if self._early is None:
            return self._utf8.decode(b"".join([self._bytes[token] for token in token_ids]))
        text = self._early.add(token_ids)
        if self._early.over:
            self._early = None
        return text

    def rest(self) -> str:
        """What is left of a character that never became whole."""
        return self._utf8.decode(b"", final=True) if self._early is None else self._early.rest()


class _Beginning:
    """Joins the bytes of tokens where a text begins: some decoders take its first space. `over`: from here on the
    bytes of every token are the same wherever it stands."""

    def __init__(
        self, tokenizer: Tokenizer, known: TokenBytes, utf8: codecs.IncrementalDecoder, skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._known = known
        self._utf8 = utf8
        self._skip_special_tokens = skip_special_tokens
        self._begun = False
        self._leading = known.max_leading  # characters that the beginning may still lose
        self._shared = False  # the prompt ends within a character

    def take_context(self, token_ids: Sequence[int]) -> None:
        """What stands before the output."""
        self.add(token_ids)
        self._shared = bool(self._utf8.getstate()[0])

    @property
    def over(self) -> bool:
        return self._begun and not self._leading and not self._shared

    def add(self, token_ids: Sequence[int]) -> str:
        return self._own(self._utf8.decode(b"".join([self._token(token) for token in token_ids])))

    def rest(self) -> str:
        return self._own(self._utf8.decode(b"", final=True))

    def _own(self, text: str) -> str:
        """Without the U+FFFD of a character that the prompt began and the output did not complete: it is the
        prompt's."""
        if self._shared and text:
            self._shared = False
            return text.removeprefix("\ufffd")
        return text

    def _token(self, token_id: int) -> bytes:
        if not self._tokenizer.is_shown(token_id, self._skip_special_tokens):
            return b""
        data = self._tokenizer.token_bytes(token_id) if self._begun else self._first(token_id)
        self._begun = True
        while self._leading and data:
            if data.startswith(self._known.leading):
                data = data[len(self._known.leading) :]
                self._leading -= 1
            else:
                self._leading = 0
        return data

    def _first(self, token_id: int) -> bytes:
        return self._known.first(self._tokenizer.name(token_id) or "")


class _Window:
    """For decoders that look at a token's neighbours: the tokens of the last piece are decoded again with those that
    are new, and what they add is the next piece."""

    over = False

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._given = [token for token in context if tokenizer.is_shown(token, skip_special_tokens)]
        self._held: list[int] = []

    def add(self, token_ids: Sequence[int]) -> str:
        pieces = []
        for token_id in token_ids:
            if self._tokenizer.is_shown(token_id, self._skip_special_tokens):
                self._held.append(token_id)
                pieces.append(self._piece(whole=len(self._held) >= _MAX_HELD))
        return "".join(pieces)

    def rest(self) -> str:
        return self._piece(whole=True) if self._held else ""

    def _piece(self, *, whole: bool) -> str:
        before = self._tokenizer.decode(self._given, skip_special_tokens=self._skip_special_tokens)
        after = self._tokenizer.decode(self._given + self._held, skip_special_tokens=self._skip_special_tokens)
        text = after[len(before) :]
        if not whole and (not text or text.endswith("\ufffd")):
            return ""
        self._given, self._held = (self._given + self._held)[-_CONTEXT:], []
        return text
