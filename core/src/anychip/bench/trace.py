"""Spans of a run at the stations of docs/request-lifecycle.md, in Chrome's trace format (about:tracing, Perfetto).

The calls are watched from outside, on one engine's objects: an engine that is not traced pays nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from anychip.bench.gaps import device_figures, gaps
from anychip.launch.llm import LLM
from anychip.plugin_api import DeviceProfile, DeviceSpan

_TRACKS = {"host": 1, "worker": 2, "device idle": 3}
_FIRST_STREAM = 10
_SHOWN_GAP_NS = 10_000
"""Shorter gaps are those between one kernel and the next."""


class Trace:
    """Collects spans until `save`."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._tracks = dict(_TRACKS)
        self._began = time.perf_counter_ns()

    def watch(self, owner: Any, method: str, station: str, track: str = "host") -> None:
        """Every call of owner.method becomes a span named after its station."""
        inner: Callable[..., Any] = getattr(owner, method)

        def watched(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter_ns()
            try:
                return inner(*arguments, **named)
            finally:
                self._add(station, track, start, time.perf_counter_ns())

        setattr(owner, method, watched)

    def add_device(self, spans: Sequence[DeviceSpan]) -> None:
        """What a device did, a track for each stream, and where it did nothing."""
        for stream in sorted({span.stream for span in spans}):
            self._tracks[f"device stream {stream}"] = _FIRST_STREAM + stream
        for span in spans:
            self._add(span.name, f"device stream {span.stream}", span.start_ns, span.end_ns)
        for gap in gaps(spans):
            if gap.nanoseconds > _SHOWN_GAP_NS:
                self._add(f"idle after {gap.after}, before {gap.before}", "device idle", gap.start_ns, gap.end_ns)

    def _add(self, name: str, track: str, start: int, end: int) -> None:
        span = {"name": name, "ph": "X", "ts": (start - self._began) / 1e3, "dur": (end - start) / 1e3}
        self._events.append({**span, "pid": 1, "tid": self._tracks[track]})

    def save(self, path: Path) -> None:
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": track}}
            for track, number in self._tracks.items()
        ]
        path.write_text(json.dumps({"traceEvents": names + self._events, "displayTimeUnit": "ms"}))


@contextmanager
def traced(llm: LLM, path: Path | None) -> Iterator[dict[str, Any]]:
    """Writes a trace of what an engine in this process does within the context; the dictionary then has the device's
    figures, where the platform can tell them. A worker in a process of its own shows as what the host waits for.
    None: nothing is watched."""
    figures: dict[str, Any] = {}
    if path is None:
        yield figures
        return
    worker = getattr(llm.engine.executor, "worker", None)
    with worker.platform.profiler() if worker is not None else nullcontext(DeviceProfile()) as device:
        trace = _trace_engine(llm, worker)
        yield figures
    trace.add_device(device.spans)
    trace.save(path)
    figures |= device_figures(device.spans)


def _trace_engine(llm: LLM, worker: Any) -> Trace:
    trace, engine = Trace(), llm.engine
    trace.watch(llm.inputs, "process", "2 input processor")
    trace.watch(engine, "step", "4 engine core: step")
    trace.watch(engine.scheduler, "schedule", "5 scheduler")
    trace.watch(engine.executor, "launch", "6 executor: launch")
    trace.watch(engine.executor, "sample", "6 executor: sample")
    trace.watch(engine.executor, "collect", "6 executor: collect")
    trace.watch(engine.scheduler, "update", "10 scheduler: update")
    trace.watch(llm.outputs, "process", "11 output processor")
    if worker is not None:
        trace.watch(worker.runner, "launch", "7 model runner", "worker")
        trace.watch(worker.program, "forward", "8 forward pass", "worker")
        trace.watch(worker.program, "sample", "9 sampling", "worker")
    return trace
