"""fake-hostlen: a device whose attention kernel takes exact lengths from the host, whose memory has no indexed
writes, and whose graphs freeze host arguments unless they are renewed before each replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anychip.ops.reference import DenseCacheAttention, attend_row
from anychip.plugin_api import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchView,
    Capabilities,
    Communicator,
    EagerCall,
    FusedMoE,
    GraphCapture,
    GraphLevel,
    GroupSpec,
    MoESpec,
    PlannedCall,
    Platform,
    PlatformContext,
    Recorder,
    RunOutsideGraph,
    ShapeKey,
    ShapePolicy,
    StepLimits,
)
from anychip_conformance.fakes.functional import DenseMoE
from anychip_conformance.fakes.recorded import refuse_host_copy, refuse_host_read
from anychip_conformance.fakes.recorded_communicator import RecordedCommunicator, host_communicator

BLOCK_SIZE = 128
_GRAPH_ROWS = (1, 2, 4, 8, 16)
_PIECE_TOKENS = (8, 32)


# -- graphs -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Task:
    """One recorded operation: its arguments are fixed at capture, but for what `renew` replaces."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any

    def replay(self) -> None:
        result = self.run(*self.arguments, **self.keywords)
        for old, new in zip(_tensors(self.output), _tensors(result), strict=True):
            if old.data_ptr() != new.data_ptr():  # a view, or an operation in place, is where it should be
                old.copy_(new)


class Recording(TorchDispatchMode):
    """Lists what runs. A value read on the host has no place in a graph, nor has a tensor of the host's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[Task] = []
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        refuse_host_read(func)
        refuse_host_copy(func)
        output = func(*args, **(kwargs or {}))
        self.tasks.append(Task(func, args, dict(kwargs or {}), output))
        return output


@dataclass(slots=True)
class RecordedGraph:
    tasks: list[Task]
    recorder: Recorder
    output: Any
    num_replays: int = 0


@dataclass(slots=True)
class RecordedPieces:
    pieces: list[list[Task] | EagerCall]
    output: Any
    num_replays: int = 0


class HostlenGraphs(GraphCapture):
    level = GraphLevel.FULL

    def __init__(self) -> None:
        self.recording: Recording | None = None

    def collective(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """RecordedCommunicator's: what a collective does inside is none of the graph's."""
        recording = self.recording
        if recording is None or recording.paused:
            return run(*arguments)
        recording.paused = True
        try:
            output = run(*arguments)
        finally:
            recording.paused = False
        recording.tasks.append(Task(run, arguments, {}, output))
        return output

    def capture(
        self,
        fn: Callable[[], Any],
        key: ShapeKey,
        *,
        recorder: Recorder | None = None,
        communicators: Sequence[Communicator] = (),
    ) -> RecordedGraph:
        self.recording = Recording()
        try:
            with self.recording:
                output = fn()
            return RecordedGraph(self.recording.tasks, recorder or Recorder(), output)
        finally:
            self.recording = None

    def capture_pieces(
        self,
        fn: Callable[[RunOutsideGraph], Any],
        plans: Sequence[Any],
        num_tokens: int,
        *,
        communicators: Sequence[Communicator] = (),
    ) -> RecordedPieces:
        recording, pieces = Recording(), list[list[Task] | EagerCall]()

        def run_outside_graph(call: PlannedCall) -> Tensor:
            recording.paused = True
            eager = EagerCall(call, call(plans, None))
            recording.paused = False
            pieces.extend((recording.tasks, eager))
            recording.tasks = []
            return eager.out

        self.recording = recording
        try:
            with recording:
                output = fn(run_outside_graph)
        finally:
            self.recording = None
        return RecordedPieces([*pieces, recording.tasks], output)

    def run_pieces(self, handle: RecordedPieces, plans: Sequence[Any]) -> Any:
        for piece in handle.pieces:
            if isinstance(piece, EagerCall):
                piece(plans)
            else:
                for task in piece:
                    task.replay()
        handle.num_replays += 1
        return handle.output

    def run(self, handle: RecordedGraph, plans: Sequence[Any]) -> Any:
        for group, renew in handle.recorder.renewals:
            renew(plans[group])
        for task in handle.tasks:
            task.replay()
        handle.num_replays += 1
        return handle.output


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for item in output for t in _tensors(item)] if isinstance(output, list | tuple) else []


# -- attention ----------------------------------------------------------------------------------------------


@torch.library.custom_op("anychip_fake::paged_attention", mutates_args=())
def paged_attention(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """The device's kernel: lengths are host arguments, as some vendors' kernels have them."""
    spec = AttentionSpec(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=q.shape[2],
        dtype="float32",
        kv_dtype="float32",
        window=window or None,
        softcap=softcap or None,
    )
    out = torch.zeros_like(q)
    begin = 0
    for row, (count, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        if count:
            pages = cache[table[row, : -(-length // BLOCK_SIZE)].long()]
            k, v = pages[:, 0].flatten(0, 1)[:length], pages[:, 1].flatten(0, 1)[:length]
            out[begin : begin + count] = attend_row(q[begin : begin + count], k, v, spec, scale=scale, sinks=sinks)
        begin += count
    return out


@dataclass(slots=True)
class HostlenPlan:
    """`source` says for every cache slot which token is written there, or -1: the device gathers, it does not
    scatter."""

    group: int
    positions: Tensor
    table: Tensor
    source: Tensor  # [num_blocks * BLOCK_SIZE] int32
    query_lens: list[int]
    seq_lens: list[int]
    recorder: Recorder | None = None


class HostlenAttention(DenseCacheAttention):
    name = "fake-hostlen"
    block_sizes = (BLOCK_SIZE,)

    def __init__(self, spec: AttentionSpec, graphs: HostlenGraphs) -> None:
        super().__init__(spec)
        self._graphs = graphs
        self._num_blocks = 0

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Tensor:
        raw.zero_()
        self._num_blocks = num_blocks
        return super().make_cache(raw, num_blocks, block_size)

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: HostlenPlan | None = None,
        recorder: Recorder | None = None,
    ) -> HostlenPlan:
        assert batch.host_exact and batch.host_seq_lens is not None and batch.host_slot_mapping is not None
        assert batch.slot_mapping.dtype == torch.int32, "slots are int32 here"
        source = np.full(self._num_blocks * BLOCK_SIZE, -1, dtype=np.int32)
        tokens = np.flatnonzero(batch.host_slot_mapping >= 0)
        source[batch.host_slot_mapping[tokens]] = tokens
        rows = shape.num_reqs - len(batch.host_query_lens)
        query_lens = batch.host_query_lens.tolist() + [0] * rows
        seq_lens = batch.host_seq_lens.tolist() + [0] * rows
        if into is not None:
            into.source.copy_(torch.from_numpy(source))
            into.query_lens, into.seq_lens = query_lens, seq_lens
            return into
        return HostlenPlan(
            group,
            batch.positions,
            batch.block_table,
            torch.from_numpy(source),
            query_lens,
            seq_lens,
            recorder,
        )

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: HostlenPlan, layer: AttentionLayer) -> Tensor:
        taken = plan.source.clamp(min=0).long()
        written = torch.stack((k[taken], v[taken]), dim=1).unflatten(0, (-1, BLOCK_SIZE)).transpose(1, 2)
        is_new = (plan.source >= 0).view(-1, 1, BLOCK_SIZE, 1, 1)
        cache.copy_(torch.where(is_new, written, cache))  # the whole cache, never an index
        return cache

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        order = np.arange(len(cache))
        order[list(dst)] = list(src)
        return cache.copy_(cache.index_select(0, torch.from_numpy(order)))

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        kept = np.ones(len(cache), dtype=bool)
        kept[list(ids)] = False
        return cache.copy_(torch.where(torch.from_numpy(kept).view(-1, 1, 1, 1, 1), cache, 0))

    def attend(
        self,
        q: Tensor,
        cache: Tensor,
        plan: HostlenPlan,
        layer: AttentionLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        spec = self.spec
        result = paged_attention(
            q, cache, plan.table, plan.query_lens, plan.seq_lens, spec.num_kv_heads, layer.scale,
            spec.window or 0, spec.softcap or 0.0, layer.sinks,
        )  # fmt: skip
        if plan.recorder is not None and self._graphs.recording is not None:
            task = next(t for t in reversed(self._graphs.recording.tasks) if "paged_attention" in t.run.name())

            def renew(new: HostlenPlan) -> None:
                before, after = task.arguments[:3], task.arguments[5:]
                task.arguments = (*before, new.query_lens, new.seq_lens, *after)

            plan.recorder.on_replay(plan.group, renew)
        return result


# -- the platform -------------------------------------------------------------------------------------------


class HostlenShapes(ShapePolicy):
    """Decode steps come in a few sizes, each with a graph; others with few tokens are filled up and run in pieces."""

    def __init__(self, limits: StepLimits) -> None:
        self._keys = [
            ShapeKey(num_tokens=rows, num_reqs=rows, num_samples=rows, max_query_len=1, num_pages=max(limits.max_pages))
            for rows in _GRAPH_ROWS
            if rows <= limits.max_num_reqs
        ]

        self._pieces = [count for count in _PIECE_TOKENS if count <= limits.max_num_tokens]

    def keys(self) -> Sequence[ShapeKey]:
        return self._keys

    def pieces(self) -> Sequence[int]:
        return self._pieces

    def bucket(
        self,
        *,
        num_tokens: int,
        num_reqs: int,
        num_samples: int,
        max_query_len: int,
        num_pages: int,
        features: tuple[str, ...],
    ) -> ShapeKey:
        if max_query_len == 1:
            for key in self._keys:
                if num_reqs <= key.num_reqs:
                    return replace(key, features=features)  # of which the runs with none, and with taps, have graphs
        return super().bucket(
            num_tokens=next((count for count in self._pieces if count >= num_tokens), num_tokens),
            num_reqs=num_reqs,
            num_samples=num_samples,
            max_query_len=max_query_len,
            num_pages=num_pages,
            features=features,
        )


class HostlenPlatform(Platform):
    capabilities = Capabilities(
        dtypes=frozenset({"float32"}),
        kv_dtypes=frozenset({"float32"}),
        quantization=frozenset({"int8"}),
        alibi=False,
        block_sizes=(BLOCK_SIZE,),
        slot_dtype="int32",
        max_slots=2**16,
        host_lengths="exact",
        padding="dummy_request",
        stale_kv="must_be_finite",
        graph_level=GraphLevel.FULL,
        collectives="runtime",
        lora=True,
    )

    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        self._graphs = HostlenGraphs()

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        return HostlenAttention(spec, self._graphs)

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        return DenseMoE(spec, self)

    def communicator(self, group: GroupSpec) -> Communicator:
        inner = host_communicator(group)
        return inner if group.size == 1 else RecordedCommunicator(inner, self._graphs.collective)

    def kv_budget(self, profile: object) -> int:
        return 2**24

    def graph_capture(self) -> GraphCapture:
        return self._graphs

    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        return HostlenShapes(limits)
