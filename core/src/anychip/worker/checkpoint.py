"""Streams a checkpoint's tensors from mapped safetensors files into the layers that want them.

One tensor is in flight at a time and only this rank's share of it is read: a weight is never held twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anychip.errors import CheckpointError
from anychip.layers.build import WeightRegister
from anychip.plugin_api import WeightView
from anychip.types import DType

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class FileView:
    """plugin_api.WeightView over one tensor of a mapped file."""

    def __init__(self, name: str, path: Path, lazy: Any) -> None:
        self._name, self._path, self._lazy = name, path, lazy

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._lazy.get_shape())

    @property
    def source(self) -> str:
        return f"tensor {self._name!r} of {self._path}"

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        tensor: Tensor = self._lazy[tuple(slice(start, stop) for start, stop in bounds)]
        return tensor


class DummyView:
    """plugin_api.WeightView over numbers made from the tensor's name: the same on every rank and machine."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType) -> None:
        self._name, self.shape, self._dtype = name, shape, getattr(torch, dtype)

    @property
    def source(self) -> str:
        return f"dummy tensor {self._name!r}"

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        if len(self.shape) == 1:
            return torch.ones([stop - start for start, stop in bounds], dtype=self._dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(self._name.encode()))
        whole = torch.randn(self.shape, generator=generator, dtype=torch.float32) * 0.02
        return whole[tuple(slice(start, stop) for start, stop in bounds)].to(self._dtype)


class CountingView:
    """Counts the bytes that layers read through it."""

    def __init__(self, view: WeightView) -> None:
        self._view = view
        self.nbytes = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self._view.shape

    @property
    def source(self) -> str:
        return self._view.source

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        tensor = self._view.read(*bounds)
        self.nbytes += tensor.nbytes
        return tensor


def checkpoint_views(folder: Path) -> Iterator[tuple[str, WeightView]]:
    """Every tensor of a checkpoint, file by file. Raises CheckpointError where there is nothing to read."""
    for path in _files(folder):
        with ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, FileView(name, path, file.get_slice(name))


def dummy_views(register: WeightRegister, dtype: DType) -> Iterator[tuple[str, WeightView]]:
    """What the layers want, made up."""
    for slot in list(register.slots.values()):
        yield slot.name, DummyView(slot.name, slot.shape, dtype)


def load_weights(register: WeightRegister, views: Iterator[tuple[str, WeightView]], origin: str) -> int:
    """Gives each wanted tensor to its layer; returns the bytes read. Raises CheckpointError for a tensor that is
    missing, unknown or mis-shaped, naming it and its file."""
    missing = dict(register.slots)
    nbytes = 0
    for name, view in views:
        slot = missing.pop(name, None)
        if slot is None:
            if name.endswith(register.ignored) and name not in register.slots:
                continue
            raise CheckpointError(f"{view.source} has no place in the model; is config.json from another checkpoint?")
        if view.shape != slot.shape:
            raise CheckpointError(f"{view.source} has shape {list(view.shape)}, the model wants {list(slot.shape)}")
        counted = CountingView(view)
        slot.load(counted)
        nbytes += counted.nbytes
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        first = missing[names[0]]
        raise CheckpointError(
            f"{origin} lacks tensor {names[0]!r} of shape {list(first.shape)} ({prod(first.shape)} values){more}"
        )
    for finish in register.finishers:
        finish()
    return nbytes


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(msgspec.json.decode(index.read_bytes())["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f"{index} names {absent[0]}, which is not in {folder}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read; anychip reads "
                "safetensors only: convert it with save_pretrained(..., safe_serialization=True)"
            )
        raise CheckpointError(f"{folder} holds no *.safetensors file; --load-format dummy runs without weights")
    return files
