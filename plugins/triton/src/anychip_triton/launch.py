"""One way to launch a kernel, so that compiling ahead sees every launch as it will be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from torch import Tensor

from anychip_triton.targets import Target
from anychip_triton.tiles import Tile, TileTable

Grid = tuple[int, ...]

_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_IDS = ("out", "expert_ids")
"""Arguments by which kernels give ids, where they are integers."""


def split_tile(tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes in the kernel's spelling, and launch options."""
    blocks = {name.upper(): value for name, value in tile.items() if name not in _OPTIONS}
    return blocks, {name: value for name, value in tile.items() if name in _OPTIONS}


def chained(target: Target, kernel: Any) -> tuple[dict[str, bool], dict[str, bool]]:
    """Arguments and options of a kernel by which it begins while the one before it ends, where the target can."""
    if "CHAINED" not in kernel.arg_names:
        return {}, {}
    return {"CHAINED": target.chains}, {"launch_pdl": True} if target.chains else {}


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
        self._rehearsing = False
        self._made: list[Any] = []

    def __call__(self, kernel: Any, grid: Grid, options: dict[str, int], **arguments: Any) -> None:
        more, chaining = chained(self.target, kernel)
        arguments |= more
        if self._rehearsing:
            self._made.append(kernel.warmup(grid=grid, **arguments, **options, **self._options, **chaining))
            for ids in (arguments.get(name) for name in _IDS):
                if isinstance(ids, Tensor) and not ids.is_floating_point():
                    ids.zero_()  # what comes next may use them as indexes
        elif 0 not in grid:
            kernel[grid](**arguments, **options, **self._options, **chaining)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Kernels that are called within are not run but compiled and loaded, side by side: done when the context ends.
        What they would have written is left as it was, ids are 0."""
        from triton.runtime import driver
        from triton.runtime._async_compile import AsyncCompileMode

        self._rehearsing, self._made = True, []
        try:
            with ThreadPoolExecutor() as pool, AsyncCompileMode(pool):
                yield
            # Launchers of their own, which triton has the C compiler make for each form, are asked for here too.
            here = driver.active.get_current_device()
            with ThreadPoolExecutor(initializer=driver.active.set_current_device, initargs=(here,)) as pool:
                list(pool.map(_load, {id(made): made for made in self._made}.values()))
        finally:
            self._rehearsing, self._made = False, []


def _load(made: Any) -> None:
    """A compiled kernel, or the promise of one."""
    kernel = made.result() if hasattr(made, "future") else made
    kernel.run  # noqa: B018  a property that loads
