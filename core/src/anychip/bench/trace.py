"""Spans of a run at the stations of docs/request-lifecycle.md, in Chrome's trace format (about:tracing, Perfetto).

The calls are watched from outside, on one engine's objects: an engine that is not traced pays nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anychip.launch.llm import LLM

_TRACKS = {"host": 1, "worker": 2}


class Trace:
    """Collects spans until `save`."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
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

    def _add(self, name: str, track: str, start: int, end: int) -> None:
        span = {"name": name, "ph": "X", "ts": (start - self._began) / 1e3, "dur": (end - start) / 1e3}
        self._events.append({**span, "pid": 1, "tid": _TRACKS[track]})

    def save(self, path: Path) -> None:
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": track}}
            for track, number in _TRACKS.items()
        ]
        path.write_text(json.dumps({"traceEvents": names + self._events, "displayTimeUnit": "ms"}))


def trace_engine(llm: LLM) -> Trace:
    """Watches an engine in this process. A worker in a process of its own shows as what the host waits for."""
    trace, engine = Trace(), llm.engine
    trace.watch(llm.inputs, "process", "2 input processor")
    trace.watch(engine, "step", "4 engine core: step")
    trace.watch(engine.scheduler, "schedule", "5 scheduler")
    trace.watch(engine.executor, "launch", "6 executor: launch")
    trace.watch(engine.executor, "sample", "6 executor: sample")
    trace.watch(engine.executor, "collect", "6 executor: collect")
    trace.watch(engine.scheduler, "update", "10 scheduler: update")
    trace.watch(llm.outputs, "process", "11 output processor")
    worker = getattr(engine.executor, "worker", None)
    if worker is not None:
        trace.watch(worker.runner, "launch", "7 model runner", "worker")
        trace.watch(worker.program, "forward", "8 forward pass", "worker")
        trace.watch(worker.program, "sample", "9 sampling", "worker")
    return trace
