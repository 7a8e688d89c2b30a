"""How many threads weights are turned with: no more than there are cores that nobody else uses.

Pieces are small, and a thread that has lost its core to a neighbour is waited for at each of them. On two busy cores,
int4 at load took 15 s with two threads and 1.1 s with one; on two idle ones 1.3 s and 1.1 s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def spare_threads() -> Iterator[None]:
    """torch's threads are restored at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_spare(before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def num_spare(most: int) -> int:
    """At least one, at most `most`, by the load of the last minute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(most, cores - round(os.getloadavg()[0])))
