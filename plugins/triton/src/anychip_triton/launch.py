"""One way to launch a kernel, so that compiling ahead sees every launch as it will be."""

from __future__ import annotations

from typing import Any, Protocol

from anychip_triton.targets import Target
from anychip_triton.tiles import Tile, TileTable

Grid = tuple[int, ...]

_OPTIONS = ("num_warps", "num_stages")


def split_tile(tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes in the kernel's spelling, and launch options."""
    blocks = {name.upper(): value for name, value in tile.items() if name not in _OPTIONS}
    return blocks, {name: value for name, value in tile.items() if name in _OPTIONS}


class Launcher(Protocol):
    """`target` and `tiles` are what callers choose sizes by."""

    target: Target
    tiles: TileTable

    def __call__(self, kernel: Any, grid: Grid, options: dict[str, int], **arguments: Any) -> None:
        """Runs a kernel; `options` are num_warps and num_stages."""
        ...


class JitLauncher:
    """Through Triton's own compiler and its cache on disk, or its interpreter."""

    def __init__(self, target: Target, tiles: TileTable) -> None:
        self.target = target
        self.tiles = tiles
        self._options = dict(target.launch_options)

    def __call__(self, kernel: Any, grid: Grid, options: dict[str, int], **arguments: Any) -> None:
        if 0 not in grid:
            kernel[grid](**arguments, **options, **self._options)
