"""AscendPlatform: the vendor's ops through torch_npu, HCCL and ACL graphs; core's reference for what the ops lack."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import with_wide_scales
from anychip.plugin_api import (
    NAMED,
    SCHEMES,
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    Communicator,
    DeviceFault,
    Event,
    FusedMoE,
    GraphCapture,
    GraphLevel,
    GroupSpec,
    LinearKernel,
    LinearSpec,
    MemoryInfo,
    MoESpec,
    PeakMemory,
    Platform,
    PlatformContext,
    ShapePolicy,
    StepLimits,
    Unsupported,
)
from anychip_ascend.attention import FusedAttention, PlainAttention
from anychip_ascend.attention_call import causal_mask
from anychip_ascend.attention_choice import BLOCK_SIZE, FUSED_LIMITS, AttentionChoice, choose_attention
from anychip_ascend.communicator import NO_PIPELINE, HcclCommunicator
from anychip_ascend.faults import explained
from anychip_ascend.generations import Generation, generation_of, unknown_chip
from anychip_ascend.graph import NpuGraphs
from anychip_ascend.linear import linear_kernel
from anychip_ascend.moe import moe_kernel
from anychip_ascend.ops import AscendOps
from anychip_ascend.options import AscendOptions
from anychip_ascend.runtime import allow_internal_formats, device_module, streams_left
from anychip_ascend.shapes import AscendShapes
from anychip_ascend.streams import StreamBudget

_LEVELS = {"full": GraphLevel.FULL, "pieces": GraphLevel.PIECEWISE, "off": GraphLevel.NONE}
_MAX_SLOTS = 2**20
"""Tokens that one cache may hold: with 1024 values to a token and kind, its pages just pass 2^31 no more."""

_OF_8BIT_FLOATS = frozenset(
    name for name, scheme in NAMED.items() if scheme.values.startswith("fp8") or scheme.scale_format == "e4m3"
)
_POLL_S = 0.002


class NpuEvent(Event):
    """A point in the current stream."""

    def __init__(self) -> None:
        self._event = device_module().Event()
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def query(self) -> bool:
        return bool(self._event.query())


class AscendPlatform(Platform):
    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        options = context.options
        assert isinstance(options, AscendOptions)
        self._options = options
        device_module().set_device(context.device_indexes[0])
        self.generation = self.find_generation()
        if self.generation.nz:
            allow_internal_formats(False)
        budget = StreamBudget(self.streams_left, self.generation.streams, self.generation.most_graphs)
        level = _LEVELS[options.graphs] if self.generation.graphs else GraphLevel.NONE
        self._graphs = NpuGraphs(level, budget)
        self._reasons: dict[str, None] = {}
        dtypes = frozenset(self.generation.dtypes)
        self.capabilities = Capabilities(
            dtypes=dtypes,
            kv_dtypes=dtypes,
            quantization=SCHEMES if self.generation.fp8 else SCHEMES - _OF_8BIT_FLOATS,
            slot_dtype="int32",
            max_slots=_MAX_SLOTS,
            block_sizes=(BLOCK_SIZE,),
            host_lengths="exact",
            padding="dummy_request",
            stale_kv="must_be_finite",
            graph_level=self._graphs.level,
            collectives="runtime",
            streams=True,
        )

    # -- devices and streams ------------------------------------------------------------------------------

    def find_generation(self) -> Generation:
        """By the name that the runtime gives the device. Raises Unsupported for one that is not known."""
        chip = str(device_module().get_device_name(self.context.device_indexes[0]))
        generation = generation_of(chip)
        if generation is None:
            raise Unsupported("anychip-ascend", [unknown_chip(chip)])
        return generation

    def streams_left(self) -> int | None:
        return streams_left()

    def device(self, index: int) -> str:
        return f"npu:{index}"

    def seed(self, n: int) -> None:
        super().seed(n)
        device_module().manual_seed_all(n)

    def synchronize(self) -> None:
        device_module().synchronize()

    def event(self) -> NpuEvent:
        return NpuEvent()

    # -- memory -------------------------------------------------------------------------------------------

    def memory(self, device: int) -> MemoryInfo:
        # What torch holds and does not use is as free as what the driver calls free.
        npu = device_module()
        free, total = npu.mem_get_info(device)
        kept = npu.memory_reserved(device) - npu.memory_allocated(device)
        return MemoryInfo(free=free + kept, total=total)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def measure(self, fn: Callable[[], Any]) -> PeakMemory:
        npu = device_module()
        fn()  # kernels are loaded, workspaces taken
        npu.synchronize()
        before = npu.memory_allocated()
        npu.reset_peak_memory_stats()
        fn()
        npu.synchronize()
        return PeakMemory(nbytes=npu.max_memory_allocated() - before, exact=True)

    # -- kernels ------------------------------------------------------------------------------------------

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        choice = choose_attention(spec, self.generation)
        if self._options.attention == "plain":
            choice = AttentionChoice("reference", "--device-opt attention=plain")
        if choice.op == "reference":
            self._note(f"attention of head_dim {spec.head_dim} runs on the reference: {choice.why}")
            return PlainAttention(spec, choice, self._graphs)
        return FusedAttention(spec, choice, self._mask, self._graphs)

    @cached_property
    def _mask(self) -> Tensor:
        return causal_mask(self.default_device)

    def linear(self, spec: LinearSpec) -> LinearKernel:
        self.check(spec)
        return linear_kernel(with_wide_scales(spec), self, self.generation, nz=self._options.nz and self.generation.nz)

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        return moe_kernel(spec, self, self.generation, self._graphs)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return AscendOps(self.generation).overrides()

    def communicator(self, group: GroupSpec) -> Communicator:
        if group.size == 1:
            return Communicator(group)
        if group.purpose == "pp":
            raise Unsupported(self.name, [NO_PIPELINE])
        return HcclCommunicator(group, self.default_device, self._options.hccl_buffer_mib)

    # -- steps --------------------------------------------------------------------------------------------

    def graph_capture(self) -> GraphCapture:
        return self._graphs

    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        return AscendShapes(limits, self._graphs.level, self._graphs.budget)

    def _note(self, text: str) -> None:
        self._reasons[text] = None

    @property
    def notes(self) -> Sequence[str]:
        generation = self.generation
        lacking = [f"{generation.name} has no {op}, in its place: {rest}" for op, rest in generation.lacks.items()]
        if not generation.lacks:
            lacking = [FUSED_LIMITS]
        if self._graphs.level < GraphLevel.FULL:
            why = f"graphs={self._options.graphs}" if generation.graphs else f"{generation.name} captures none"
            instead = "between attention calls only" if self._graphs.level else "not at all: steps run eagerly"
            lacking.append(f"graphs {instead} ({why})")
        return (*lacking, *self._reasons, *self._graphs.notes)

    # -- life ---------------------------------------------------------------------------------------------

    def health(self, deadline_s: float) -> None:
        event, until = NpuEvent(), time.monotonic() + deadline_s
        while not event.query():
            if time.monotonic() > until:
                raise DeviceFault(
                    f"{self.default_device} has not finished its work within {deadline_s:g} s",
                    kind="timeout", fatal=True, remedy="a kernel or a collective may hang: restart the engine",
                )  # fmt: skip
            time.sleep(_POLL_S)

    def explain(self, exc: BaseException) -> DeviceFault | None:
        if not isinstance(exc, RuntimeError):
            return None
        free = total = None
        if isinstance(exc, torch.OutOfMemoryError) or "out of memory" in str(exc):
            info = self.memory(self.context.device_indexes[0])
            free, total = info.free, info.total
        return explained(str(exc), self.default_device, free=free, total=total)

    def close(self, reason: str) -> None:
        self._graphs = NpuGraphs(GraphLevel.NONE, self._graphs.budget)
        super().close(reason)
        device_module().empty_cache()
