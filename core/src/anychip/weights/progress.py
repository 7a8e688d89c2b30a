"""Counts what is read from a checkpoint, and shows it where somebody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor
from torch import dtype as torch_dtype

from anychip.plugin_api import WeightView


class LoadProgress:
    """`nbytes` and `seconds` of a load. Its bar goes to a terminal's standard error, on one rank only; `got_on` hears
    of every read."""

    def __init__(self, total_bytes: int, *, shown: bool, got_on: Callable[[str], None] = lambda doing: None) -> None:
        self._got_on = got_on
        self.nbytes = 0
        self.seconds = 0.0
        self._how = "read"
        self._bar = Progress(
            TextColumn("loading weights"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            disable=not (shown and sys.stderr.isatty()),
            transient=True,
        )
        self._task = self._bar.add_task("load", total=total_bytes)

    def track(self, views: Iterator[tuple[str, WeightView]]) -> Iterator[tuple[str, WeightView]]:
        """The same views, counted as they are read."""
        start = time.perf_counter()
        with self._bar:
            for name, view in views:
                yield name, CountedView(view, self)
                self._bar.update(self._task, completed=self.nbytes)
        self.seconds = time.perf_counter() - start

    def read(self, nbytes: int) -> None:
        """So many bytes more have been read."""
        self.nbytes += nbytes
        self._got_on(f"{self.nbytes / 1e9:.2f} GB of weights are read")

    def restore(self, nbytes: int, fn: Callable[[], bool]) -> bool:
        """Runs fn, which restores weights of so many bytes, or says False."""
        start = time.perf_counter()
        if not fn():
            return False
        self.nbytes, self.seconds, self._how = nbytes, time.perf_counter() - start, "restored as they were packed"
        return True

    def __str__(self) -> str:
        gigabytes = self.nbytes / 1e9
        rate = gigabytes / max(self.seconds, 1e-9)
        return f"weights: {gigabytes:.2f} GB {self._how} in {self.seconds:.2f} s ({rate:.1f} GB/s)"


class CountedView:
    """plugin_api.WeightView that adds what is read through it to a LoadProgress."""

    def __init__(self, view: WeightView, progress: LoadProgress) -> None:
        self._view, self._progress = view, progress

    @property
    def shape(self) -> tuple[int, ...]:
        return self._view.shape

    @property
    def dtype(self) -> torch_dtype:
        return self._view.dtype

    @property
    def nbytes(self) -> int:
        return self._view.nbytes

    @property
    def source(self) -> str:
        return self._view.source

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        tensor = self._view.read(*bounds)
        self._progress.read(tensor.nbytes)
        return tensor
