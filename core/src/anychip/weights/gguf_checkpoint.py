"""A GGUF model as a checkpoint: its tensors by the names that a Hugging Face checkpoint of the family gives them.

A matrix of a block type has two views: `module.weight` with floats, and `module.q4_k` (its type in small letters) with
the blocks as they lie in the file. Layers that hold plain values want the one, those that hold a scheme the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from torch import Tensor

from anychip.errors import CheckpointError
from anychip.gguf.block_types import RARE
from anychip.gguf.config import config_of, family_of
from anychip.gguf.families import AnyPlaced, Placed, PlacedByHead, PlacedTogether, placed
from anychip.gguf.header import StoredTensor
from anychip.gguf.model import is_gguf, read_model
from anychip.plugin_api import WeightView
from anychip.weight_files import WeightFile
from anychip.weights.checkpoint import Checkpoint
from anychip.weights.gguf_file import GGUFView, HeadsView, TurnsView
from anychip.weights.opened_file import OpenedFile


class GGUFCheckpoint:
    """`folder` is the file, or its first piece. Reads headers when it is made; raises as gguf.model.read_model does,
    and ConfigError for an architecture that is not served."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model = read_model(folder)
        self._head_dim = int(config_of(self._model)["head_dim"])
        self._placed = list(placed(family_of(self._model), self._model.tensors))

    @property
    def files(self) -> list[WeightFile]:
        return [WeightFile(path) for path in self._model.paths]

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for each in self._placed for name in _names(each))

    @property
    def notes(self) -> tuple[str, ...]:
        """How the tensors are stored, and which types no scheme holds."""
        counts = Counter(tensor.type.name for tensor in self._model.tensors.values())
        listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        rare = sorted(counts.keys() & RARE)
        lost = (f"{' and '.join(rare)}: no scheme holds such tensors; matrices become int8",) if rare else ()
        return (f"GGUF ({self._model.metadata.architecture}): tensors are {listed}", *lost)

    def views(self) -> Iterator[tuple[str, WeightView]]:
        """Every tensor in the order of its bytes, file by file."""
        for path in self._model.paths:
            file = OpenedFile(path)
            try:
                file.read_ahead()
                here = [each for each in self._placed if _first(each).path == path]
                for each in sorted(here, key=lambda each: (_first(each).offset, getattr(each, "expert", None) or 0)):
                    yield from self._views_of(file, each)
            finally:
                file.close()

    def read(self, name: str) -> Tensor:
        """One tensor, whole."""
        for found, view in self.views():
            if found == name:
                return view.read()
        raise CheckpointError(f"{self.folder} has no tensor {name!r}")

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same: no file has one twice."""
        return first == second

    def _views_of(self, file: OpenedFile, each: AnyPlaced) -> Iterator[tuple[str, WeightView]]:
        if isinstance(each, PlacedTogether):
            yield each.name, TurnsView(each)
            return
        if isinstance(each, PlacedByHead):
            yield each.name, HeadsView(each)
            return
        for name in _names(each):
            yield name, GGUFView(file, each, self._head_dim, blocks=name != each.name)


def _first(each: AnyPlaced) -> StoredTensor:
    return each.tensor if isinstance(each, Placed) else each.tensors[0]


def _names(each: AnyPlaced) -> tuple[str, ...]:
    if not isinstance(each, Placed) or each.tensor.type.is_plain:
        return (each.name,)
    return each.name, f"{each.name.removesuffix('.weight')}.{each.tensor.type.name.lower()}"


def open_checkpoint(path: Path) -> Checkpoint | GGUFCheckpoint:
    """Of a folder, or of a GGUF file."""
    return GGUFCheckpoint(path) if is_gguf(path) else Checkpoint(path)
