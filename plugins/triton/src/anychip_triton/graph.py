"""Decode steps as graphs, one for each bucket of rows and pages; small steps with prompts in pieces, a set of graphs
for each bucket of tokens. Captured when first needed, in one memory pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from anychip.plugin_api import (
    CapturedShapes,
    Communicator,
    EagerCall,
    GraphCapture,
    GraphLevel,
    PlannedCall,
    Recorder,
    RunOutsideGraph,
    ShapeKey,
    StepLimits,
)

_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_PAGES_STEP = 8
"""Each bucket of pages is that many times the one before: a step copies its block table whole."""

_FEWEST_PAGES = 64

_PIECE_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512)
"""Above, a device needs longer for a step than the host to launch it."""

_POOL_BYTES = 256 << 20
_GRAPH_BYTES = 12 << 20
_PIECES_BYTES_PER_TOKEN = 512 << 10
"""What a pool holds for the largest step's activations, each graph for its nodes and arguments, and pieces for the
queries, keys and values of every layer: estimates that `reserve` sets aside, to be replaced by measured ones."""


class DecodeShapes(CapturedShapes):
    """A bucket of rows and one of pages for each graph."""

    def __init__(self, limits: StepLimits) -> None:
        rows = [count for count in _ROWS if count < limits.max_num_reqs] + [limits.max_num_reqs]
        longest = max(limits.max_pages)
        pages = [longest]
        while pages[-1] > _FEWEST_PAGES:
            pages.append(max(_FEWEST_PAGES, pages[-1] // _PAGES_STEP))
        keys = [
            ShapeKey(num_tokens=count, num_reqs=count, num_samples=count, max_query_len=1, num_pages=size)
            for count in rows
            for size in reversed(pages)
            if count <= limits.max_num_tokens
        ]
        super().__init__(keys, [count for count in _PIECE_TOKENS if count <= limits.max_num_tokens])


@dataclass(slots=True, weakref_slot=True, eq=False)
class DeviceGraph:
    graph: torch.cuda.CUDAGraph
    recorder: Recorder
    output: Any


@dataclass(slots=True, weakref_slot=True, eq=False)
class DevicePieces:
    pieces: list[torch.cuda.CUDAGraph | EagerCall]
    output: Any


H = TypeVar("H", DeviceGraph, DevicePieces)


class DeviceGraphs(GraphCapture):
    level = GraphLevel.FULL
    lazy = True
    draws = True

    def __init__(self, rehearsal: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Within a rehearsal, kernels are compiled and not run."""
        self._pool: Any = None
        self._side: Any = None
        self._handles = WeakSet[DeviceGraph | DevicePieces]()
        self._rehearsal = rehearsal

    def reserve(self, keys: Sequence[ShapeKey], pieces: Sequence[int] = ()) -> int:
        if not keys and not pieces:
            return 0
        return _POOL_BYTES + _GRAPH_BYTES * (len(keys) + len(pieces)) + _PIECES_BYTES_PER_TOKEN * sum(pieces)

    def affordable(self, keys: Sequence[ShapeKey], budget: int) -> Sequence[ShapeKey]:
        return keys[: max(0, (budget - _POOL_BYTES) // _GRAPH_BYTES)]

    def capture(
        self,
        fn: Callable[[], Any],
        key: ShapeKey,
        *,
        recorder: Recorder | None = None,
        communicators: Sequence[Communicator] = (),
    ) -> DeviceGraph:
        self._rehearse(fn, communicators)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            output = fn()
        return self._kept(DeviceGraph(graph, recorder or Recorder(), output))

    def _rehearse(self, fn: Callable[[], Any], communicators: Sequence[Communicator]) -> None:
        """Kernels are compiled, and libraries choose theirs, outside the capture. Every capture is made on one stream:
        libraries keep tens of megabytes for each stream that they were called on."""
        if self._side is None:
            self._side = torch.cuda.Stream()
        if not self._handles:  # torch gives a pool up with its last graph, and takes its id no more
            self._pool = torch.cuda.graph_pool_handle()
        with self._rehearsal():
            fn()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            fn()
        torch.cuda.current_stream().wait_stream(self._side)
        for communicator in communicators:
            communicator.register(self._pool)

    def _kept(self, handle: H) -> H:
        self._handles.add(handle)
        return handle

    def run(self, handle: DeviceGraph, plans: Sequence[Any]) -> Any:
        for group, renew in handle.recorder.renewals:
            renew(plans[group])
        handle.graph.replay()
        return handle.output

    def capture_pieces(
        self,
        fn: Callable[[RunOutsideGraph], Any],
        plans: Sequence[Any],
        num_tokens: int,
        *,
        communicators: Sequence[Communicator] = (),
    ) -> DevicePieces:
        self._rehearse(lambda: fn(lambda call: call(plans, None)), communicators)
        pieces, outs = list[torch.cuda.CUDAGraph | EagerCall](), dict[torch.Size, Tensor]()

        def begin() -> None:
            pieces.append(torch.cuda.CUDAGraph())
            pieces[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

        def run_outside_graph(call: PlannedCall) -> Tensor:
            pieces[-1].capture_end()
            out = call(plans, None)
            # A piece has read a call's result before the next call is made: layers share a tensor.
            out = outs.setdefault(out.shape, out)
            pieces.append(EagerCall(call, out))
            begin()
            return out

        torch.cuda.synchronize()
        with torch.cuda.stream(self._side):
            begin()
            output = fn(run_outside_graph)
            pieces[-1].capture_end()
        torch.cuda.current_stream().wait_stream(self._side)
        return self._kept(DevicePieces(pieces, output))

    def run_pieces(self, handle: DevicePieces, plans: Sequence[Any]) -> Any:
        for piece in handle.pieces:
            if isinstance(piece, EagerCall):
                piece(plans)
            else:
                piece.replay()
        return handle.output
