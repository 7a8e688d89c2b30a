"""Memory in huge pages, and the peak resident memory of a call, from the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import PeakMemory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


HUGE_PAGE = 2 << 20


def zeroed(nbytes: int) -> Tensor:
    """uint8 [nbytes] zeros. From two huge pages on, in huge pages where the system gives them, and resident only as it
    is written: a stream of weights then misses the address cache 512 times less often."""
    # A planner builds layers of fake tensors, which hold nothing.
    fake = type(torch.empty(0)) is not Tensor
    if fake or nbytes < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    # Room to begin at a huge page's boundary; what is never touched costs address space alone.
    area = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    skip = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % HUGE_PAGE
    # The end that fills no huge page takes small ones: matrices are many, and would waste one half on average.
    whole = skip + nbytes // HUGE_PAGE * HUGE_PAGE
    area.madvise(mmap.MADV_HUGEPAGE, skip, whole - skip)
    if hasattr(mmap, "MADV_NOHUGEPAGE") and whole < len(area):
        area.madvise(mmap.MADV_NOHUGEPAGE, whole, len(area) - whole)
    return torch.frombuffer(area, dtype=torch.uint8, offset=skip, count=nbytes)


def peak_resident(fn: Callable[[], Any]) -> PeakMemory:
    """Runs fn. Where the kernel lets the mark be reset, what fn added to it; elsewhere 0, inexactly."""
    _trim_heap()
    try:
        _CLEAR.write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
    except (OSError, KeyError):
        fn()
        return PeakMemory(nbytes=0, exact=False)
    fn()
    peak = _status_bytes("VmHWM")
    _trim_heap()
    return PeakMemory(nbytes=max(0, peak - before), exact=True)


def _trim_heap() -> None:
    """Gives back what was freed and kept: before fn, which would use it again so that it would not show, and after, for
    a profile's step is the largest that there will be, and weights that were loaded leave much behind."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep little
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
