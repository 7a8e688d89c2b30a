"""Where a device waited: the gaps between its spans, whichever stream they ran on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from anychip.plugin_api import DeviceSpan

LONG_GAP_NS = 100_000


@dataclass(frozen=True, slots=True)
class Gap:
    """Nothing ran between the end of `after` and the start of `before`."""

    start_ns: int
    end_ns: int
    after: str
    before: str

    @property
    def nanoseconds(self) -> int:
        return self.end_ns - self.start_ns


def gaps(spans: Iterable[DeviceSpan]) -> Iterator[Gap]:
    """In order of time."""
    last: DeviceSpan | None = None
    for span in sorted(spans, key=lambda span: span.start_ns):
        if last is not None and span.start_ns > last.end_ns:
            yield Gap(last.end_ns, span.start_ns, last.name, span.name)
        if last is None or span.end_ns > last.end_ns:
            last = span


def device_figures(spans: Iterable[DeviceSpan]) -> dict[str, Any]:
    """The device's share of work from its first span to its last, and its gaps; empty without spans."""
    spans = list(spans)
    if not spans:
        return {}
    idle = sorted(gap.nanoseconds for gap in gaps(spans))
    whole = max(span.end_ns for span in spans) - min(span.start_ns for span in spans)
    return {
        "device_spans": len(spans),
        "device_busy_share": 1 - sum(idle) / whole if whole else 1.0,
        "device_gaps": len(idle),
        "device_gaps_over_100_us": sum(gap > LONG_GAP_NS for gap in idle),
        "device_longest_gap_us": idle[-1] / 1e3 if idle else 0.0,
    }
