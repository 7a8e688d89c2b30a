"""Tensors of GGUF files as plugin_api.WeightView: under the checkpoint's names, in its order of rows, as floats or as
the blocks that the file holds."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from anychip.errors import CheckpointError
from anychip.gguf.families import Placed, PlacedByHead, PlacedTogether
from anychip.gguf.header import StoredTensor
from anychip.weights.blocks import dequantize_rows
from anychip.weights.opened_file import OpenedFile

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def read_rows(file: OpenedFile, tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """uint8 [rows, bytes]: innermost extents from `start` to `stop`, counted over all outer ones."""
    held = torch.empty((stop - start, tensor.row_bytes), dtype=torch.uint8)
    file.read_into(held.flatten(), tensor.offset + start * tensor.row_bytes)
    return held


def as_floats(tensor: StoredTensor, rows: Tensor) -> Tensor:
    """What read_rows gave, [rows, columns]: plain values in their dtype, others in float32."""
    return rows.view(_DTYPES[tensor.type.name]) if tensor.type.is_plain else dequantize_rows(tensor.type, rows)


class GGUFView:
    """`blocks`: as the file holds them, uint8 [rows, bytes of a row]. `head_dim` is needed where rows are paired."""

    def __init__(self, file: OpenedFile, placed: Placed, head_dim: int, *, blocks: bool = False) -> None:
        tensor = placed.tensor
        self._file, self._placed, self._blocks = file, placed, blocks
        self._head_dim = head_dim
        extents = tensor.shape if placed.expert is None else tensor.shape[1:]
        self._first = 0 if placed.expert is None else placed.expert * prod(extents[:-1])
        self.shape = (*extents[:-1], tensor.row_bytes) if blocks else extents
        plain = tensor.type.is_plain and not placed.unit_offset
        self.dtype = torch.uint8 if blocks else _DTYPES[tensor.type.name] if plain else torch.float32

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def source(self) -> str:
        return self._placed.tensor.source

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        values = self._vector() if len(self.shape) == 1 else self._rows(*(bounds[:1] or ((0, self.shape[0]),)))
        if self._placed.unit_offset:
            values = values.float() - 1.0
        inner = bounds if len(self.shape) == 1 else ((0, len(values)), *bounds[1:])
        return values[tuple(slice(*each) for each in inner)]

    def _vector(self) -> Tensor:
        """[values]: norms and biases, whole."""
        tensor = self._placed.tensor
        values = as_floats(tensor, read_rows(self._file, tensor, 0, 1)).flatten()
        return values[self._order(0, len(values))] if self._placed.paired_rows else values

    def _rows(self, bounds: tuple[int, int]) -> Tensor:
        """Of a matrix; of a tensor with more extents, all rows of the outermost ones."""
        tensor, (start, stop) = self._placed.tensor, bounds
        if self._placed.paired_rows:
            begin, end = start // self._head_dim * self._head_dim, -(-stop // self._head_dim) * self._head_dim
            held = read_rows(self._file, tensor, begin, min(end, self.shape[0]))[self._order(start, stop) - begin]
        else:
            each = prod(self.shape[1:-1])
            held = read_rows(self._file, tensor, self._first + start * each, self._first + stop * each)
        values = held if self._blocks else as_floats(tensor, held)
        return values.view(stop - start, *self.shape[1:])

    def _order(self, start: int, stop: int) -> Tensor:
        """Where the file has the checkpoint's rows: of a head it pairs the n-th of the first half with the n-th of the
        second."""
        half = self._head_dim // 2
        rows = torch.arange(start, stop)
        within = rows % self._head_dim
        return rows - within + within % half * 2 + within // half


class _FloatsOfSeveral:
    """What views have in common that make one tensor of the checkpoint's of several of the file's."""

    dtype = torch.float32
    shape: tuple[int, ...]

    def __init__(self, tensors: Sequence[StoredTensor]) -> None:
        self._tensors = tensors

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def source(self) -> str:
        return " and ".join(tensor.source for tensor in self._tensors)


class TurnsView(_FloatsOfSeveral):
    """Two tensors [rows, features] whose features take turns: the checkpoint's has twice as many."""

    def __init__(self, placed: PlacedTogether) -> None:
        super().__init__(placed.tensors)
        rows, features = placed.tensors[0].shape
        self.shape = (rows, 2 * features)

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        values = [floats_of(tensor, 0, tensor.shape[0]) for tensor in self._tensors]
        return torch.stack(values, dim=-1).flatten(1)[tuple(slice(*each) for each in bounds)]


class HeadsView(_FloatsOfSeveral):
    """Of every head its keys' rows above its values', [heads * features, latent]."""

    def __init__(self, placed: PlacedByHead) -> None:
        super().__init__(placed.tensors)
        (heads, latent, keys), values = placed.tensors[0].shape, placed.tensors[1].shape
        if values[:1] + values[2:] != (heads, latent):
            raise CheckpointError(f"{self.source} have shapes {[heads, latent, keys]} and {list(values)}")
        self._head = keys + values[1]
        self.shape = (heads * self._head, latent)

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        start, stop = bounds[0] if bounds else (0, self.shape[0])
        first, last = start // self._head, -(-stop // self._head)
        parts = []
        for tensor in self._tensors:
            each = tensor.shape[1]
            parts.append(floats_of(tensor, first * each, last * each).view(last - first, each, -1))
        whole = torch.cat((parts[0].transpose(1, 2), parts[1]), dim=1).flatten(0, 1)
        whole = whole[start - first * self._head : stop - first * self._head]
        return whole[:, slice(*bounds[1])] if len(bounds) > 1 else whole


def floats_of(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """float32 [rows, columns] of a tensor in whatever piece of the model it is."""
    file = OpenedFile(tensor.path)
    try:
        return as_floats(tensor, read_rows(file, tensor, start, stop)).float()
    finally:
        file.close()
