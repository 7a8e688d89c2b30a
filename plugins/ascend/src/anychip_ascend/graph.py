"""ACL graphs: decode steps whole, steps with prompts in pieces between attention calls, and, where neither can be, the
same calls made eagerly at each step.

A fused attention takes lengths as lists on the host, which a graph freezes. Each such call is a task group: at replay
its arguments are set again on a stream of their own, and an event that the graph waits for lets it go on. Sources:
`torch_npu/npu/graphs.py` (task groups, external events); CANN's acl_rt.h (aclmdlRICaptureTaskUpdateBegin,
aclrtGetStreamAvailableNum).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from anychip.plugin_api import (
    Communicator,
    EagerCall,
    GraphCapture,
    GraphLevel,
    PlannedCall,
    Recorder,
    RunOutsideGraph,
    ShapeKey,
)
from anychip_ascend.recording import Recording, Scratch
from anychip_ascend.runtime import device_module
from anychip_ascend.streams import StreamBudget

log = logging.getLogger("anychip.plugins")

_POOL_BYTES = 256 << 20
_GRAPH_BYTES = 16 << 20
_PIECES_BYTES_PER_TOKEN = 512 << 10
"""Estimates that `reserve` sets aside: what a pool holds for the largest step, each graph for its tasks and workspace,
and pieces for the queries, keys and values of every layer."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class CapturedGraph:
    graph: Any
    recording: Recording
    recorder: Recorder
    output: Any
    replayed: Any = None
    """Marks the end of the last replay; None before the first."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class CapturedPieces:
    pieces: list[Any]  # graphs and EagerCalls, in turn
    output: Any


H = TypeVar("H", CapturedGraph, CapturedPieces)


@dataclass(slots=True, eq=False)
class EagerStep:
    """Stands where a capture could not be made: the step is run anew each time. `why` is for people."""

    fn: Callable[..., Any]
    why: str


class NpuGraphs(GraphCapture):
    """`level` NONE captures nothing; PIECEWISE pieces only."""

    def __init__(self, level: GraphLevel, budget: StreamBudget) -> None:
        self.level = level
        self.budget = budget
        self.recording: Recording | None = None
        self.notes: list[str] = []
        """Why steps run eagerly that were to be graphs."""
        self._obstacles: list[str] | None = None
        self._pool: Any = None
        self._side: Any = None
        self._updates: Any = None
        self._scratch = Scratch()
        self._live = WeakSet[CapturedGraph | CapturedPieces]()

    def reads_host(self, why: str) -> None:
        """Said by kernels that look at a value on the host: a graph cannot hold them."""
        if self._obstacles is not None and why not in self._obstacles:
            self._obstacles.append(why)

    def reserve(self, keys: Sequence[ShapeKey], pieces: Sequence[int] = ()) -> int:
        if self.level == GraphLevel.NONE or not (keys or pieces):
            return 0
        return _POOL_BYTES + _GRAPH_BYTES * (len(keys) + len(pieces)) + _PIECES_BYTES_PER_TOKEN * sum(pieces)

    def affordable(self, keys: Sequence[ShapeKey], budget: int) -> Sequence[ShapeKey]:
        return keys[: max(0, (budget - _POOL_BYTES) // _GRAPH_BYTES)]

    # -- whole steps --------------------------------------------------------------------------------------

    def capture(
        self,
        fn: Callable[[], Any],
        key: ShapeKey,
        *,
        recorder: Recorder | None = None,
        communicators: Sequence[Communicator] = (),
    ) -> CapturedGraph | EagerStep:
        with self._watched() as obstacles:
            self._rehearse(fn, communicators)
        if why := self._obstacle(obstacles, graphs=1, communicators=communicators):
            return self._eager(fn, f"{key.num_reqs} rows", why)
        graph, self.recording = device_module().NPUGraph(), Recording(self._scratch)
        try:
            with (
                self.budget.spent(),
                device_module().graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"),
            ):
                output = fn()
            return self._kept(CapturedGraph(graph, self.recording, recorder or Recorder(), output))
        finally:
            self.recording = None

    def run(self, handle: CapturedGraph | EagerStep, plans: Sequence[Any]) -> Any:
        if isinstance(handle, EagerStep):
            return handle.fn()
        npu = device_module()
        if handle.replayed is None:
            handle.replayed = npu.Event()
        else:
            # The arguments are the graph's own: they may change only once its last replay is through with them.
            handle.replayed.synchronize()
        for group, renew in handle.recorder.renewals:
            renew(plans[group])
        with npu.stream(self._updates):
            for task in handle.recording.tasks:
                npu.graph_task_update_begin(self._updates, task.handle)
                task.call.run_into(task.workspace, task.out, task.lse)
                npu.graph_task_update_end(self._updates)
                task.event.record(self._updates)
        handle.graph.replay()
        handle.replayed.record()
        return handle.output

    # -- pieces -------------------------------------------------------------------------------------------

    def capture_pieces(
        self,
        fn: Callable[[RunOutsideGraph], Any],
        plans: Sequence[Any],
        num_tokens: int,
        *,
        communicators: Sequence[Communicator] = (),
    ) -> CapturedPieces | EagerStep:
        calls = 0

        def rehearsed(call: PlannedCall) -> Tensor:
            nonlocal calls
            calls += 1
            with self._unwatched():  # a call between pieces may read what it likes
                return call(plans, None)

        with self._watched() as obstacles:
            self._rehearse(lambda: fn(rehearsed), communicators)
        calls //= 2  # two rehearsals
        if why := self._obstacle(obstacles, graphs=calls + 1, communicators=communicators):
            return self._eager(fn, f"{num_tokens} tokens in pieces", why)
        npu, pieces, outs = device_module(), list[Any](), dict[torch.Size, Tensor]()

        def begin() -> None:
            pieces.append(npu.NPUGraph())
            pieces[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

        def run_outside_graph(call: PlannedCall) -> Tensor:
            pieces[-1].capture_end()
            out = call(plans, None)
            # A piece has read a call's result before the next call is made: layers share a tensor.
            out = outs.setdefault(out.shape, out)
            pieces.append(EagerCall(call, out))
            begin()
            return out

        npu.synchronize()
        with self.budget.spent(calls + 1), npu.stream(self._side):
            begin()
            output = fn(run_outside_graph)
            pieces[-1].capture_end()
        npu.current_stream().wait_stream(self._side)
        return self._kept(CapturedPieces(pieces, output))

    def run_pieces(self, handle: CapturedPieces | EagerStep, plans: Sequence[Any]) -> Any:
        if isinstance(handle, EagerStep):
            return handle.fn(lambda call: call(plans, None))
        for piece in handle.pieces:
            if isinstance(piece, EagerCall):
                piece(plans)
            else:
                piece.replay()
        return handle.output

    # -- both ---------------------------------------------------------------------------------------------

    def _rehearse(self, fn: Callable[[], Any], communicators: Sequence[Communicator]) -> None:
        """Twice: kernels are loaded on the current stream, and memory is taken on the one that captures."""
        npu = device_module()
        if self._side is None:
            self._side, self._updates = npu.Stream(), npu.Stream()
        if not self._live:  # a pool goes with its last graph, and its id is taken no more
            self._pool, self._scratch = npu.graph_pool_handle(), Scratch()
        fn()
        self._side.wait_stream(npu.current_stream())
        with npu.stream(self._side):
            fn()
        npu.current_stream().wait_stream(self._side)
        for communicator in communicators:
            communicator.register(self._pool)

    def _kept(self, handle: H) -> H:
        self._live.add(handle)
        return handle

    @contextmanager
    def _watched(self) -> Iterator[list[str]]:
        """What kernels say within that keeps them out of a graph."""
        self._obstacles = obstacles = list[str]()
        try:
            yield obstacles
        finally:
            self._obstacles = None

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        kept, self._obstacles = self._obstacles, None
        try:
            yield
        finally:
            self._obstacles = kept

    def _obstacle(self, obstacles: list[str], *, graphs: int, communicators: Sequence[Communicator]) -> str:
        """Why no capture is made; "" where one is."""
        if obstacles:
            return obstacles[0]
        return self.budget.short_of(graphs, num_groups=len(communicators))

    def _eager(self, fn: Callable[..., Any], what: str, why: str) -> EagerStep:
        note = f"steps of {what} run eagerly: {why}"
        self.notes.append(note)
        log.warning("anychip-ascend: %s", note)
        return EagerStep(fn, why)
