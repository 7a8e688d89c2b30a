"""Weights made up from their tensors' names, for runs without a checkpoint.

All are cut from one pool of noise, so that tens of gigabytes cost little more than copying them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from anychip.errors import ConfigError
from anychip.plugin_api import WeightView
from anychip.types import DType
from anychip.weights.register import WeightRegister

_SPREAD = 0.02
_PIECE = 1 << 20
"""Values of the pool that are drawn at once; a cut begins anywhere in the first piece."""


def _plain_bytes(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


class NoisePool:
    """Normal numbers, drawn as far as they are asked for: how far does not change them. `longest` is how many values of
    a tensor lie next to each other in the pool; a larger one is made of several cuts. `allocate` gives so many bytes of
    host memory."""

    def __init__(
        self, dtype: torch.dtype, longest: int = 1 << 24, allocate: Callable[[int], Tensor] = _plain_bytes
    ) -> None:
        self.dtype, self.longest = dtype, longest
        self._num_pieces = 0
        pieces = 1 + -(-longest // _PIECE)
        self._values = allocate(pieces * _PIECE * dtype.itemsize).view(dtype)

    def cut(self, begins: int, count: int) -> Tensor:
        """Values from one of the first piece's on."""
        if count > self.longest:  # a single row, which repeats itself
            return torch.cat([self.cut(begins, self.longest), self.cut(begins, count - self.longest)])
        while self._num_pieces * _PIECE < begins + count:
            start = self._num_pieces * _PIECE
            self._values[start : start + _PIECE].copy_(self._piece(self._num_pieces))
            self._num_pieces += 1
        return self._values[begins : begins + count]

    def _piece(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(_PIECE, generator=generator, dtype=torch.float32) * _SPREAD


class DummyView:
    """plugin_api.WeightView over numbers made from the tensor's name: the same on every rank and machine."""

    def __init__(self, name: str, shape: tuple[int, ...], pool: NoisePool) -> None:
        self._name, self.shape, self.dtype, self._pool = name, shape, pool.dtype, pool

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * int(self.dtype.itemsize)

    @property
    def source(self) -> str:
        return f"dummy tensor {self._name!r}"

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        start, stop = bounds[0] if bounds else (0, self.shape[0])
        if len(self.shape) == 1:
            return torch.ones(stop - start, dtype=self.dtype)
        height = max(1, self._pool.longest // prod(self.shape[1:]))  # of a cut, in rows
        cuts = [self._rows(index, height, start, stop) for index in range(start // height, -(-stop // height))]
        rows = cuts[0] if len(cuts) == 1 else torch.cat(cuts)
        return rows[(slice(None), *(slice(*inner) for inner in bounds[1:]))]

    def _rows(self, index: int, height: int, start: int, stop: int) -> Tensor:
        """Of rows start to stop those that lie in a cut."""
        top = index * height
        shape = (min(height, self.shape[0] - top), *self.shape[1:])
        begins = zlib.crc32(f"{self._name}:{index}".encode()) % _PIECE
        return self._pool.cut(begins, prod(shape)).view(shape)[max(0, start - top) : stop - top]


def dummy_views(
    register: WeightRegister, dtype: DType, allocate: Callable[[int], Tensor] = _plain_bytes
) -> Iterator[tuple[str, WeightView]]:
    """What the layers want, made up; `allocate` gives memory that copies to the device."""
    pool = NoisePool(getattr(torch, dtype), allocate=allocate)
    for slot in list(register.slots.values()):
        if slot.shape is None or slot.name in register.optional:
            raise ConfigError(
                f"load_format dummy makes up plain weights, and the checkpoint is quantized ({slot.name}); "
                "use --quantization int8 or int4 on the unquantized model's config.json"
            )
        yield slot.name, DummyView(slot.name, slot.shape, pool)
