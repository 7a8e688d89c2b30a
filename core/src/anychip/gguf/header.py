"""Reads what one GGUF file says of itself: its metadata and where its tensors lie. No tensor is read.

Layout, little-endian: "GGUF", uint32 version, uint64 number of tensors, uint64 number of metadata; each of these a
string, a uint32 type and the value; each tensor a string, uint32 dimensions, uint64 extents with the innermost first,
a uint32 type, a uint64 offset from where the tensors begin, which is the next multiple of general.alignment. A string
is a uint64 length and UTF-8.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct
from typing import Any

from anychip.errors import CheckpointError
from anychip.gguf.block_types import BLOCK_TYPES, BlockType

VERSIONS = (2, 3)
_MAGIC = b"GGUF"
_MOST_HEADER_BYTES = 1 << 30
_AT_ONCE = 4 << 20
_MOST_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[Struct, str]] = {
    0: (Struct("<B"), "B"), 1: (Struct("<b"), "b"), 2: (Struct("<H"), "H"), 3: (Struct("<h"), "h"),
    4: (Struct("<I"), "I"), 5: (Struct("<i"), "i"), 6: (Struct("<f"), "f"), _BOOL: (Struct("<?"), "B"),
    10: (Struct("<Q"), "Q"), 11: (Struct("<q"), "q"), 12: (Struct("<d"), "d"),
}  # fmt: skip
"""By a value's type: how one is written, and array.array's code for many."""
_MOST_NESTED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a file. `shape` has the outermost extent first; `offset` counts from the file's beginning."""

    name: str
    path: Path
    shape: tuple[int, ...]
    type: BlockType
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.type.size * self.type.nbytes

    @property
    def row_bytes(self) -> int:
        """Of the innermost extent."""
        return self.shape[-1] // self.type.size * self.type.nbytes

    @property
    def source(self) -> str:
        return f"tensor {self.name!r} of {self.path}"


@dataclass(frozen=True, slots=True)
class Texts:
    """A list of texts as the file has them: vocabularies are long, and most readers of a header want none."""

    path: Path
    count: int
    data: bytes
    begin: int

    def read(self) -> list[str]:
        """Raises CheckpointError for one that is not UTF-8."""
        found, at, length = [], 0, _SCALARS[10][0].unpack_from
        for _ in range(self.count):
            end = at + 8 + length(self.data, at)[0]
            found.append(decoded(self.path, self.data[at + 8 : end], self.begin + at + 8))
            at = end
        return found


def decoded(path: Path, data: bytes | bytearray, at: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _broken(path, f"a text at byte {at} is not UTF-8: {error.reason}") from error


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a readable GGUF file: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Raises CheckpointError for a file that is cut short, of another version, or not a GGUF file."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        return _Reader(path, fd).header()
    finally:
        os.close(fd)


class _Reader:
    """A place in the header's bytes, which are read as they are needed."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._data = bytearray()
        self._at = 0

    def header(self) -> Header:
        self._check_version()
        num_tensors, num_metadata = self._number(10), self._number(10)
        # Each takes some bytes at least, so a count that is made up ends here and not in the memory.
        if num_tensors * 24 + num_metadata * 13 > self._size:
            raise self._broken(f"it announces {num_tensors} tensors and {num_metadata} settings in {self._size} bytes")
        metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            key = self._string()
            if key in metadata:
                raise self._broken(f"its metadata holds {key!r} twice")
            metadata[key] = self._value(self._number(4), key)
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise self._broken(f"general.alignment is {alignment!r}; it is a multiple of 8")
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, stored, offset in entries:
            if name in tensors:
                raise self._broken(f"it holds tensor {name!r} twice")
            tensor = StoredTensor(name=name, path=self.path, shape=shape, type=stored, offset=begin + offset)
            end = tensor.offset + tensor.nbytes
            if end > self._size:
                raise self._broken(
                    f"tensor {name!r} ends at byte {end}, the file has {self._size}: it is cut short; download it again"
                )
            tensors[name] = tensor
        return Header(path=self.path, metadata=metadata, tensors=tensors)

    def _check_version(self) -> None:
        if (magic := bytes(self._take(4))) != _MAGIC:
            raise self._broken(f"it begins with {magic!r}, and a GGUF file with {_MAGIC!r}")
        version = self._number(4)
        if version in VERSIONS:
            return
        known = f"versions {' and '.join(map(str, VERSIONS))} are read"
        if version & 0xFFFF == 0:
            raise self._broken(f"it is big-endian; little-endian files of {known}: convert it with gguf-py")
        if version < min(VERSIONS):
            raise self._broken(f"it is of GGUF version {version}, {known}; convert the model again with llama.cpp")
        raise self._broken(f"it is of GGUF version {version}, {known}; a newer anychip may read it")

    def _entry(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self._string()
        count = self._number(4)
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise self._broken(f"tensor {name!r} has {count} dimensions; 1 to {_MOST_DIMENSIONS} are possible")
        shape = tuple(reversed([self._number(10) for _ in range(count)]))
        number = self._number(4)
        offset = self._number(10)
        if number not in BLOCK_TYPES:
            known = ", ".join(each.name for each in BLOCK_TYPES.values())
            raise self._broken(f"tensor {name!r} is of type {number}, which is not known; known are {known}")
        stored = BLOCK_TYPES[number]
        if min(shape) <= 0 or prod(shape) > 1 << 48:
            raise self._broken(f"tensor {name!r} has shape {list(shape)}")
        if shape[-1] % stored.size:
            raise self._broken(
                f"tensor {name!r} has rows of {shape[-1]} values, which blocks of {stored.size} ({stored.name}) "
                "do not divide"
            )
        return name, shape, stored, offset

    def _value(self, kind: int, key: str, nested: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(kind)
        if kind != _ARRAY or nested == _MOST_NESTED:
            raise self._broken(f"metadata {key!r} has a value of type {kind}; types 0 to 12 are known")
        inner, count = self._number(4), self._number(10)
        if inner in _SCALARS:
            form, code = _SCALARS[inner]
            values = array(code)
            values.frombytes(self._take(count * form.size))
            return [bool(value) for value in values] if inner == _BOOL else values
        least = 8 if inner == _STRING else 12
        if count * least > self._size:
            raise self._broken(f"metadata {key!r} announces {count} values in a file of {self._size} bytes")
        return self._texts(count) if inner == _STRING else [self._value(inner, key, nested + 1) for _ in range(count)]

    def _texts(self, count: int) -> Texts:
        begin, length = self._at, _SCALARS[10][0].unpack_from
        for _ in range(count):
            if self._at + 8 > len(self._data):
                self._fill(self._at + 8)
            self._at += 8 + length(self._data, self._at)[0]
            if self._at > len(self._data):
                self._fill(self._at)
        return Texts(self.path, count, bytes(self._data[begin : self._at]), begin)

    def _number(self, kind: int) -> Any:
        form = _SCALARS[kind][0]
        return form.unpack(self._take(form.size))[0]

    def _string(self) -> str:
        data = self._take(self._number(10))
        return decoded(self.path, data, self._at - len(data))

    def _take(self, count: int) -> bytearray:
        end = self._at + count
        self._fill(end)
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _fill(self, end: int) -> None:
        """So that the bytes before `end` are there."""
        if end > self._size:
            raise self._broken(f"its header goes on beyond byte {self._at}, the file has {self._size}: it is cut short")
        if end > _MOST_HEADER_BYTES:
            raise self._broken(f"its header would take more than {_MOST_HEADER_BYTES} bytes")
        while end > len(self._data):
            piece = os.pread(self._fd, max(_AT_ONCE, end - len(self._data)), len(self._data))
            if not piece:
                raise self._broken("it became shorter while it was read")
            self._data += piece

    def _broken(self, why: str) -> CheckpointError:
        return _broken(self.path, why)
