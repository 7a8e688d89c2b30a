"""The bytes that one token adds to a text, read from the decoder that tokenizer.json names.

A token need not be a whole character, so it has bytes, not text. Decoders that look at one token after the other are
read here: byte-level BPE, byte fallback, SentencePiece's spaces, WordPiece. Others (CTC, BPE's word ends) are not: what
one of their tokens adds depends on its neighbours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Regex, decoders

_ANCHOR = "a"
"""A token that stands before another one, to see what the other adds after it."""


class TokenBytes:
    """What tokens add to a text, by their names in the vocabulary. `leading`: a character, and how many of it the
    decoder takes from the beginning of a text."""

    def __init__(self, parts: Sequence[Any], to_bytes: Callable[[str], bytes], leading: tuple[str, int]) -> None:
        self._parts = parts
        self._to_bytes = to_bytes
        self.leading = leading[0].encode()
        self.max_leading = leading[1]

    @classmethod
    def of(cls, decoder: decoders.Decoder | None) -> TokenBytes | None:
        """None for a decoder whose tokens cannot be read one by one."""
        if decoder is None:  # `tokenizers` puts spaces between tokens that have no decoder
            return cls([decoders.WordPiece(prefix="\0", cleanup=False)], str.encode, ("", 0))
        parts: list[Any] = []
        to_bytes: Callable[[str], bytes] = str.encode
        leading = ("", 0)
        fused = False
        for spec in _flat(json.loads(decoder.__getstate__())):
            kind = spec["type"]
            if kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and spec["stop"] == 0 and not leading[1]:
                leading = (spec["content"], spec["start"])
            elif kind in _TO_BYTES and to_bytes is str.encode and not fused:
                to_bytes = _TO_BYTES[kind]
                fused = kind == "ByteLevel"
            elif kind in _PARTS and to_bytes is str.encode and not fused:
                parts.append(_PARTS[kind](spec))
            else:
                return None
        return cls(parts, to_bytes, leading)

    def after_others(self, token: str) -> bytes:
        """What the token adds to a text that has begun."""
        for part in self._parts:
            token = part.decode([_ANCHOR, token])[len(part.decode([_ANCHOR])) :]
        return self._to_bytes(token)

    def first(self, token: str) -> bytes:
        """What the token is as the first of a text: some decoders leave out its space."""
        for part in self._parts:
            token = part.decode([token])
        return self._to_bytes(token)


def _flat(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [inner for part in spec["decoders"] for inner in _flat(part)]


def _replace(spec: Mapping[str, Any]) -> decoders.Decoder:
    pattern = spec["pattern"]
    return decoders.Replace(pattern["String"] if "String" in pattern else Regex(pattern["Regex"]), spec["content"])


_PARTS: dict[str, Callable[[Mapping[str, Any]], decoders.Decoder]] = {
    "Replace": _replace,
    "Strip": lambda spec: decoders.Strip(spec["content"], left=spec["start"], right=spec["stop"]),
    "Metaspace": lambda spec: decoders.Metaspace(spec["replacement"], prepend_scheme=spec["prepend_scheme"]),
    "WordPiece": lambda spec: decoders.WordPiece(prefix=spec["prefix"], cleanup=spec["cleanup"]),
}


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary: printable ones are themselves, the others
    follow 255 in order (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
_BYTE_NAME = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_level(token: str) -> bytes:
    found = [_BYTE_OF.get(letter, -1) for letter in token]
    return token.encode() if -1 in found else bytes(found)


def _byte_fallback(token: str) -> bytes:
    found = _BYTE_NAME.fullmatch(token)
    return token.encode() if found is None else bytes([int(found[1], 16)])


_TO_BYTES: dict[str, Callable[[str], bytes]] = {"ByteLevel": _byte_level, "ByteFallback": _byte_fallback}
