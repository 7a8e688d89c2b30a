"""How long a device needs for launches, without the host's time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from anychip_triton.launch import Grid, JitLauncher
from anychip_triton.targets import Target
from anychip_triton.tiles import TileTable

_FLUSHED_BYTES = 256 << 20
"""More than any device's cache holds: weights and caches of a real step come from memory."""


class KeepingLauncher(JitLauncher):
    """Keeps what it launches, so that it can be launched again. `named`: only kernels whose name ends so."""

    def __init__(self, target: Target, tiles: TileTable, named: str = "") -> None:
        super().__init__(target, tiles)
        self._named = named
        self.kept: list[tuple[str, Callable[[], None]]] = []

    def __call__(self, kernel: Any, grid: Grid, options: dict[str, int], **arguments: Any) -> None:
        super().__call__(kernel, grid, options, **arguments)
        if kernel.__name__.endswith(self._named):
            again = partial(super().__call__, kernel, grid, options, **arguments)
            self.kept.append((kernel.__name__, again))

    def again(self) -> None:
        """Everything that was kept, in its order."""
        for _, launch in self.kept:
            launch()


def device_ms(work: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of `work` on the current device: the median of replays of a graph, each after the device's caches
    were overwritten. What `work` allocates must not outlive it."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # libraries choose their kernels outside the capture
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        work()
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begins, ends in marks:
        flushed.zero_()
        begins.record()
        graph.replay()
        ends.record()
    torch.cuda.synchronize()
    return median(begins.elapsed_time(ends) for begins, ends in marks)
