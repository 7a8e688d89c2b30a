"""A matrix on its way from a checkpoint into a kernel, streamed by rows so that no weight is ever held twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from anychip.plugin_api import QuantScheme, WeightView
from anychip.plugin_api import Span as Span

CHUNK_BYTES = 4 << 20
"""Of a plain matrix, what is read at once: it stays in the processor's cache until the kernel has taken it."""

ROW_MULTIPLE = 64
"""Chunks begin at multiples of this many rows, so that kernels which pack rows together can."""


class Put(Protocol):
    """Hands rows of one kind to a kernel: kind "" are the values, others those of LinearKernel.load."""

    def __call__(self, kind: str, tensor: Tensor, row: int = 0) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Module `name` of a checkpoint holds a matrix of `shape`, which its kernel takes in `scheme`; this rank has
    `rows` x `columns` of it."""

    name: str
    shape: tuple[int, int]
    rows: Span
    columns: Span
    scheme: QuantScheme | None
    put: Put
    takes_order: bool = False
    """Whether its kernel takes columns in an order of their own (layers/ordered_linear.py)."""


@dataclass(frozen=True, slots=True)
class StackPiece:
    """Rows of every stacked matrix: this rank's, those of one matrix of each expert."""

    rows: slice
    matrices: Sequence[Matrix]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixStack:
    """Module `name` of a checkpoint holds a matrix of `shape` = (outputs, inputs) for each of `count` experts, in which
    several of an expert's may lie. This rank holds the experts `held`: pieces have their matrices, in their order."""

    name: str
    count: int
    held: Span
    shape: tuple[int, int]
    pieces: tuple[StackPiece, ...]
    outputs_first: bool = False
    """Whether plain matrices lie as `shape` says, as a linear layer's do; else inputs come before outputs."""

    @property
    def scheme(self) -> QuantScheme | None:
        return self.pieces[0].matrices[0].scheme


def row_chunks(rows: Span, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) within the checkpoint's rows, of about CHUNK_BYTES each."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes) // ROW_MULTIPLE) * ROW_MULTIPLE
    start, end = rows.bounds
    for begin in range(start, end, step):
        yield begin, min(begin + step, end)


def stream(view: WeightView, rows: Span, columns: Span, give: Callable[[Tensor, int], None]) -> None:
    """Reads rows x columns of a matrix in chunks: `give` gets each with its first row, counted from rows.start."""
    row_bytes = view.nbytes // max(1, view.shape[0])
    for start, stop in row_chunks(rows, row_bytes):
        give(view.read((start, stop), columns.bounds), start - rows.start)


def read_one(view: WeightView) -> Tensor:
    """A tensor of one value, whatever its number of dimensions: [1] float32."""
    return view.read(*((0, 1) for _ in view.shape)).float().view(1)
