"""Reads safetensors files.

Format: https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, the tensors' bytes).
Nothing in such a file is code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from anychip.errors import CheckpointError
from anychip.weights.opened_file import OpenedFile

_MOST_HEADER_BYTES = 100 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class _Entry(msgspec.Struct):
    """A tensor in a file's header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class SafetensorsFile(OpenedFile):
    """An open file. Raises CheckpointError for one that is cut short or malformed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        length = int.from_bytes(self.peek(8), "little")
        self._begin = 8 + length
        if self.size < 8 or length > min(_MOST_HEADER_BYTES, self.size - 8):
            raise self._broken(f"its header would take {length} of {self.size} bytes")
        try:
            header = msgspec.json.decode(self.peek(length, 8), type=dict[str, msgspec.Raw])
            header.pop("__metadata__", None)
            self._entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
        except msgspec.MsgspecError as error:
            raise self._broken(f"its header cannot be read: {error}") from error
        for name, entry in self._entries.items():
            self._check(name, entry)

    def _check(self, name: str, entry: _Entry) -> None:
        if entry.dtype not in _DTYPES:
            raise self._broken(f"tensor {name!r} has dtype {entry.dtype}; known are {', '.join(_DTYPES)}")
        begin, end = entry.data_offsets
        expected = prod(entry.shape) * _DTYPES[entry.dtype].itemsize
        if begin < 0 or min(entry.shape, default=0) < 0 or end - begin != expected:
            raise self._broken(f"tensor {name!r} takes {end - begin} bytes, its shape {expected}")
        if self._begin + end > self.size:
            raise self._broken(
                f"tensor {name!r} ends at byte {self._begin + end}, the file has {self.size}: it is cut short"
            )

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a readable safetensors file: {why}")

    def names(self) -> Iterable[str]:
        return self._entries

    def views(self) -> Iterator[tuple[str, FileView]]:
        """Every tensor in the order of its bytes, so that the disk is read straight through."""
        self.read_ahead()
        for name, _ in sorted(self._entries.items(), key=lambda item: item[1].data_offsets):
            yield name, self.view(name)

    def view(self, name: str) -> FileView:
        entry = self._entries[name]
        begin = self._begin + entry.data_offsets[0]
        return FileView(self, name, tuple(entry.shape), _DTYPES[entry.dtype], begin)


class FileView:
    """plugin_api.WeightView over one tensor of a file."""

    def __init__(
        self, file: SafetensorsFile, name: str, shape: tuple[int, ...], dtype: torch.dtype, offset: int
    ) -> None:
        self._file, self._name, self._offset = file, name, offset
        self.shape, self.dtype = shape, dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def source(self) -> str:
        return f"tensor {self._name!r} of {self._file.path}"

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        if not self.shape:
            whole = torch.empty(1, dtype=self.dtype)
            self._file.read_into(whole, self._offset)
            return whole.squeeze(0)
        start, stop = bounds[0] if bounds else (0, self.shape[0])
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        self._file.read_into(rows.flatten(), self._offset + start * row_bytes)
        return rows[(slice(None), *(slice(*inner) for inner in bounds[1:]))]

    def pieces(self) -> Iterator[bytearray]:
        return self._file.pieces(self._offset, self.nbytes)


def same_bytes(first: FileView, second: FileView) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes; stops at the first that differ."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(a == b for a, b in zip(first.pieces(), second.pieces(), strict=True))
