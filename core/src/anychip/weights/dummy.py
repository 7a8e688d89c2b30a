"""Weights made up from their tensors' names, for runs without a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from anychip.errors import ConfigError
from anychip.plugin_api import WeightView
from anychip.types import DType
from anychip.weights.register import WeightRegister

_ROWS = 1024
"""Rows of one draw: a slice of a large tensor costs what it holds, not what the tensor does."""
_SPREAD = 0.02


class DummyView:
    """plugin_api.WeightView over numbers made from the tensor's name: the same on every rank and machine."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType) -> None:
        self._name, self.shape, self.dtype = name, shape, getattr(torch, dtype)

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
        first = start // _ROWS
        draws = torch.cat([self._draw(index) for index in range(first, -(-stop // _ROWS))])
        rows = draws[start - first * _ROWS : stop - first * _ROWS]
        return rows[(slice(None), *(slice(*inner) for inner in bounds[1:]))]

    def _draw(self, index: int) -> Tensor:
        rows = min(_ROWS, self.shape[0] - index * _ROWS)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._name}:{index}".encode()))
        values = torch.randn((rows, *self.shape[1:]), generator=generator, dtype=torch.float32)
        return (values * _SPREAD).to(self.dtype)


def dummy_views(register: WeightRegister, dtype: DType) -> Iterator[tuple[str, WeightView]]:
    """What the layers want, made up."""
    for slot in list(register.slots.values()):
        if slot.shape is None or slot.name in register.optional:
            raise ConfigError(
                f"load_format dummy makes up plain weights, and the checkpoint is quantized ({slot.name}); "
                "use --quantization int8 or int4 on the unquantized model's config.json"
            )
        yield slot.name, DummyView(slot.name, slot.shape, dtype)
