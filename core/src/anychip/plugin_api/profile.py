"""When a device worked: what Platform.profiler collects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DeviceSpan:
    """A kernel or a copy. Times are those of time.perf_counter_ns."""

    name: str
    start_ns: int
    end_ns: int
    stream: int = 0


@dataclass(slots=True)
class DeviceProfile:
    """`spans` are there once the profiler's context has ended."""

    spans: Sequence[DeviceSpan] = field(default_factory=list)
