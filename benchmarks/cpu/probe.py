"""How fast the machine reads memory at this moment, with anychip's own kernel for it: every thread that OMP_NUM_THREADS
allows, huge pages."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

from anychip_cpu.memory import zeroed
from anychip_cpu.native import Kernels, load
from anychip_cpu.probe import available_cores

SIZE = 1 << 30


@cache
def _opened() -> tuple[Kernels, torch.Tensor]:
    kernels = load("")
    if kernels is None:
        raise SystemExit("no compiled kernels are here; see anychip doctor")
    kernels.set_threads(int(os.environ.get("OMP_NUM_THREADS") or available_cores()))
    return kernels, zeroed(SIZE).fill_(1)


def bandwidth(repeats: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """GB/s, the median of some readings of 1 GiB."""
    kernels, data = _opened()
    seconds = []
    for _ in range(repeats):
        began = clock()
        kernels.read(data.data_ptr(), SIZE)
        seconds.append(clock() - began)
    return SIZE / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    print(f"{bandwidth(9):.1f} GB/s")
