"""Forms of kernels compiled side by side, in processes: Triton's front end holds Python's lock."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context  # noqa: TID251  a pool of the standard library's; it pickles names and numbers
from threading import Thread
from typing import TYPE_CHECKING, Any

from anychip_triton.launch import Grid, JitLauncher
from anychip_triton.targets import TARGETS, Target
from anychip_triton.tiles import Tile, TileTable, shipped_table

if TYPE_CHECKING:
    from anychip_triton.problems import Problem

Device = tuple[str, int | str, int]
"""A triton GPUTarget's backend, architecture and warp size: what code is made for."""


class Compilers:
    """What they make is in Triton's cache on disk, where the process that launches the same finds it."""

    def __init__(self, workers: int = 0) -> None:
        """They start at once, while the caller looks for its device. `workers` 0: as many as there are cores, but for
        the one that times."""
        workers = workers or max(1, (os.cpu_count() or 2) - 2)
        context = get_context("spawn")  # a device's runtime does not survive a fork
        self._pool = ProcessPoolExecutor(workers, context)
        for _ in range(workers):
            self._pool.submit(_start)

    def begin(self, target: str, device: Device, kernel: str, problems: Sequence[Problem], tile: Tile) -> Future[int]:
        """The future's result is how many launches of the kernel there are; it raises what the compiler raises."""
        return self._pool.submit(_compile, target, device, kernel, list(problems), dict(tile))

    def close(self) -> None:
        """What has not begun is not compiled."""
        self._pool.shutdown(cancel_futures=True)


class OneKernel(JitLauncher):
    """Compiles the launches of a kernel, and does nothing for others."""

    def __init__(self, target: Target, tiles: TileTable, named: str) -> None:
        super().__init__(target, tiles)
        self._rehearsing, self._named, self.compiled = True, named, 0

    def __call__(self, kernel: Any, grid: Grid, options: dict[str, int], **arguments: Any) -> None:
        if kernel.__name__.endswith(self._named):
            super().__call__(kernel, grid, options, **arguments)
            self.compiled += 1


class _StandIn:
    """A driver for processes that must not touch the device: it knows what code is made for."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*self._device)

    def is_active(self) -> bool:
        return True


def _start() -> None:
    import torch

    from anychip_triton import problems

    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.nice(10)  # the process that times comes first
    torch.set_num_threads(1)
    assert problems.PROBLEMS


def _end_with(parent: int) -> None:
    """A parent that was killed has not closed its pool."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _compile(target: str, device: Device, kernel: str, problems: list[Problem], tile: Tile) -> int:
    from triton.runtime import driver

    driver.set_active(_StandIn(device))
    launch = OneKernel(TARGETS[target], shipped_table(target).only(kernel, tile), kernel)
    for problem in problems:
        problem(launch, "meta")
    return launch.compiled
