"""Peak resident memory of a call, from the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anychip.plugin_api import PeakMemory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


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
    return PeakMemory(nbytes=max(0, _status_bytes("VmHWM") - before), exact=True)


def _trim_heap() -> None:
    """Gives back what was freed and kept: fn would use it again, and it would not show."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep little
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
