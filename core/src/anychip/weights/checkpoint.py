"""The tensors of a checkpoint's files, each taken from the file that counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from torch import Tensor

from anychip.errors import CheckpointError
from anychip.plugin_api import WeightView
from anychip.weight_files import INDEX, WeightFile, weight_files
from anychip.weights.files import FileView, SafetensorsFile, same_bytes


class Checkpoint:
    """A folder's tensors by the names that its files give them. Every method raises CheckpointError where files are
    missing or broken, or where the index is not true of them. `notes` are lines for the start."""

    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> list[WeightFile]:
        return weight_files(self.folder)

    @cached_property
    def names(self) -> frozenset[str]:
        """From the files' headers."""
        return frozenset(self._file_of)

    @cached_property
    def _file_of(self) -> dict[str, WeightFile]:
        found: dict[str, WeightFile] = {}
        for listed in self.files:
            file = SafetensorsFile(listed.path)
            try:
                names = _counted(file, listed)
            finally:
                file.close()
            for name in names:
                if name in found:
                    raise CheckpointError(
                        f"{found[name].path} and {listed.path.name} both hold tensor {name!r}, and there is no "
                        f"{INDEX} to say which counts"
                    )
                found[name] = listed
        return found

    def views(self) -> Iterator[tuple[str, WeightView]]:
        """Every tensor, file by file."""
        for listed in self.files:
            file = SafetensorsFile(listed.path)
            try:
                for name, view in file.views():
                    if self._file_of.get(name) is listed:
                        yield name, view
            finally:
                file.close()

    def read(self, name: str) -> Tensor:
        """One tensor, whole."""
        with self._opened(name) as view:
            return view.read()

    def shape(self, name: str) -> tuple[int, ...]:
        with self._opened(name) as view:
            return view.shape

    @contextmanager
    def _opened(self, name: str) -> Iterator[FileView]:
        file = SafetensorsFile(self._file_of[name].path)
        try:
            yield file.view(name)
        finally:
            file.close()

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same bytes in the same shape."""
        with self._opened(first) as a, self._opened(second) as b:
            return same_bytes(a, b)


def _counted(file: SafetensorsFile, listed: WeightFile) -> frozenset[str]:
    """The tensors of a file that count: those that the index assigns to it."""
    held = frozenset(file.names())
    if listed.tensors is None:
        return held
    absent = sorted(listed.tensors - held)
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{file.path} lacks tensor {absent[0]!r}{more}, which {INDEX} assigns to it; download the checkpoint again"
        )
    return listed.tensors
