"""Decode steps as graphs: one for each bucket of rows and pages, captured when first needed, in one memory pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anychip.plugin_api import Communicator, GraphCapture, GraphLevel, Recorder, ShapeKey, ShapePolicy, StepLimits

_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_PAGES_STEP = 8
"""Each bucket of pages is that many times the one before: a step copies its block table whole."""

_FEWEST_PAGES = 64

_POOL_BYTES = 256 << 20
_GRAPH_BYTES = 12 << 20
"""What a pool holds for the largest step's activations, and each graph for its nodes and arguments: estimates that
`reserve` sets aside, to be replaced by measured ones."""


class DecodeShapes(ShapePolicy):
    """Steps in which every row has one token come in a few sizes, each with a graph; others keep their own sizes."""

    def __init__(self, limits: StepLimits) -> None:
        rows = [count for count in _ROWS if count < limits.max_num_reqs] + [limits.max_num_reqs]
        longest = max(limits.max_pages)
        pages = [longest]
        while pages[-1] > _FEWEST_PAGES:
            pages.append(max(_FEWEST_PAGES, pages[-1] // _PAGES_STEP))
        self._keys = [
            ShapeKey(num_tokens=count, num_reqs=count, max_query_len=1, num_pages=size)
            for count in rows
            for size in reversed(pages)
            if count <= limits.max_num_tokens
        ]

    def keys(self) -> Sequence[ShapeKey]:
        return self._keys

    def bucket(
        self, *, num_tokens: int, num_reqs: int, max_query_len: int, num_pages: int, features: tuple[str, ...]
    ) -> ShapeKey:
        if max_query_len == 1 and not features:
            for key in self._keys:
                if num_reqs <= key.num_reqs and num_pages <= key.num_pages:
                    return key
        return super().bucket(
            num_tokens=num_tokens, num_reqs=num_reqs, max_query_len=max_query_len, num_pages=num_pages,
            features=features,
        )  # fmt: skip


@dataclass(slots=True)
class DeviceGraph:
    graph: torch.cuda.CUDAGraph
    recorder: Recorder
    output: Any


class DeviceGraphs(GraphCapture):
    level = GraphLevel.FULL
    lazy = True

    def __init__(self) -> None:
        self._pool: Any = None

    def reserve(self, keys: Sequence[ShapeKey]) -> int:
        return _POOL_BYTES + _GRAPH_BYTES * len(keys) if keys else 0

    def affordable(self, keys: Sequence[ShapeKey], budget: int) -> Sequence[ShapeKey]:
        return keys[: max(0, (budget - _POOL_BYTES) // _GRAPH_BYTES)]

    def capture(
        self,
        fn: Callable[[], Any],
        key: ShapeKey,
        *,
        pool: Any = None,
        recorder: Recorder | None = None,
        communicators: Sequence[Communicator] = (),
    ) -> DeviceGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Kernels are compiled, and libraries choose theirs, outside the capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fn()
        torch.cuda.current_stream().wait_stream(side)
        for communicator in communicators:
            communicator.register(self._pool)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool or self._pool, capture_error_mode="thread_local"):
            output = fn()
        return DeviceGraph(graph, recorder or Recorder(), output)

    def run(self, handle: DeviceGraph, plans: Sequence[Any]) -> Any:
        for group, renew in handle.recorder.renewals:
            renew(plans[group])
        handle.graph.replay()
        return handle.output
