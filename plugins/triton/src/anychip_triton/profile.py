"""Spans of a device's work from torch's profiler, on the host's clock."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from anychip.plugin_api import DeviceProfile, DeviceSpan

DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Categories of a device's work in the profiler's trace."""

_CLOCK = "anychip clock"


@contextmanager
def device_profile(
    activities: Collection[torch.profiler.ProfilerActivity], work: Collection[str] = DEVICE_WORK
) -> Iterator[DeviceProfile]:
    """The profiler counts from a moment of its own: a mark whose time is known on both clocks ties them together."""
    profile = DeviceProfile()
    with torch.profiler.profile(activities=activities) as profiler:
        marked = time.perf_counter_ns()
        with torch.profiler.record_function(_CLOCK):
            pass
        yield profile
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        profile.spans = device_spans(json.loads(path.read_text())["traceEvents"], work, marked)


def device_spans(events: list[Mapping[str, Any]], work: Collection[str], marked: int) -> list[DeviceSpan]:
    """Of a trace in Chrome's format, in microseconds, whose mark was made at `marked` nanoseconds."""
    mark = next(event["ts"] for event in events if (event.get("name"), event.get("cat")) == (_CLOCK, "user_annotation"))

    def host(microseconds: float) -> int:
        return marked + round((microseconds - mark) * 1000)

    return [
        DeviceSpan(
            event["name"], host(event["ts"]), host(event["ts"] + event["dur"]), event.get("args", {}).get("stream", 0)
        )
        for event in events
        if event.get("ph") == "X" and event.get("cat") in work
    ]
