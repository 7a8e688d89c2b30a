"""A GGUF file's metadata with types checked: what is asked for is there and of its kind, or the file is refused."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anychip.errors import CheckpointError
from anychip.gguf.header import Texts


class Metadata:
    """`architecture` is llama.cpp's name of the model's family; settings of it are asked for without that prefix."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values
        self.architecture = self.text("general.architecture") or ""

    def own(self, key: str) -> str:
        """The whole key of a setting of this architecture."""
        return f"{self.architecture}.{key}"

    def text(self, key: str) -> str | None:
        value: str | None = self._of(key, str, "a text")
        return value

    def flag(self, key: str) -> bool | None:
        value: bool | None = self._of(key, bool, "true or false")
        return value

    def integer(self, key: str) -> int | None:
        """A whole number. Where a file gives one for each layer, they are to be the same."""
        value = self.values.get(key)
        if isinstance(value, list | array):
            if len(set(value)) != 1:
                raise CheckpointError(
                    f"{self.path}: {key!r} differs between layers ({sorted(set(value))[:4]}), which no family here has"
                )
            value = value[0]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise self._wrong(key, value, "a number")
        return None if value is None else float(value)

    def need(self, key: str) -> int:
        """A whole number that the file must have, above 0."""
        value = self.integer(key)
        if value is None:
            raise CheckpointError(f"{self.path} has no {key!r} in its metadata; convert the model again")
        if value <= 0:
            raise self._wrong(key, value, "a number above 0")
        return value

    def texts(self, key: str) -> list[str] | None:
        value: Texts | None = self._of(key, Texts, "a list of texts")
        return None if value is None else value.read()

    def numbers(self, key: str) -> array[Any] | None:
        value: array[Any] | None = self._of(key, array, "a list of numbers")
        return value

    def _of(self, key: str, kind: type, word: str) -> Any:
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            raise self._wrong(key, value, word)
        return value

    def _wrong(self, key: str, value: Any, word: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key!r} is {str(value)[:80]!r}, expected {word}")
