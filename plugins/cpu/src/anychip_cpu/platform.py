"""CpuPlatform: the host as a device."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from anychip.ops.reference import SparseLatent, WidenedLinear, WidenedMoE, can_widen, dense_part, reference_linear
from anychip.plugin_api import (
    RECURRENCES,
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    Communicator,
    EncoderBackend,
    EncoderSpec,
    Event,
    FusedMoE,
    GraphCapture,
    GraphLevel,
    GroupSpec,
    LatentBackend,
    LatentSpec,
    LinearKernel,
    LinearSpec,
    MemoryInfo,
    MoESpec,
    PeakMemory,
    Platform,
    PlatformContext,
    ShapePolicy,
    StateBackend,
    StateSpec,
    StepLimits,
    Unsupported,
    WeightsKey,
)
from anychip_cpu import CORES_VARIABLE, RANKS_VARIABLE, CpuOptions, native
from anychip_cpu.anew import AnewLatent, AnewStates
from anychip_cpu.attention import SdpaPagedAttention
from anychip_cpu.communicator import communicator
from anychip_cpu.encoder import SdpaEncoder
from anychip_cpu.experts import CpuMoE
from anychip_cpu.graph import CpuGraphs, Recordings
from anychip_cpu.latent import CpuLatent
from anychip_cpu.latent_kernel import KernelLatent
from anychip_cpu.limits import ThreadCount, cpu_limit
from anychip_cpu.linear import CpuLinear
from anychip_cpu.memory import HUGE_PAGE, peak_resident, zeroed
from anychip_cpu.moe import GroupedMoE
from anychip_cpu.ops import CpuOps, count_tokens
from anychip_cpu.packing import why_not
from anychip_cpu.paged_attention import CpuPagedAttention
from anychip_cpu.probe import meminfo
from anychip_cpu.shapes import MOST_TOKENS, RecordedShapes
from anychip_cpu.sparse_kernel import KernelSparse
from anychip_cpu.states import CpuStates, has_kernel
from anychip_cpu.weights_cache import weights_cache

_log = logging.getLogger(__name__)

_SHARE_OF_FREE_MEMORY = 0.5


class CpuPlatform(Platform):
    capabilities = Capabilities(
        dtypes=frozenset({"float32", "bfloat16"}),
        collectives="runtime",
        mla=True,
        latent_kv_dtypes=frozenset({"float8_e4m3fn"}),
        sparse_latent=True,
        ungated_experts=True,
        recurrences=frozenset(RECURRENCES),
        lora=True,
        encoders=True,
    )
    profiled_tokens = 64

    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        if bound := os.environ.get(CORES_VARIABLE):
            os.sched_setaffinity(0, {int(core) for core in bound.split(",")})
        options = context.options
        assert isinstance(options, CpuOptions)
        self.cpu_options = options
        limits = partial(cpu_limit, ranks=int(os.environ.get(RANKS_VARIABLE) or 1))
        if options.threads > (limit := limits()).most:
            raise Unsupported(self.name, [f"threads={options.threads}: this process may use {limit.most}, {limit.why}"])
        self.kernels = native.load(options.isa)
        self.recordings = Recordings()
        if self.kernels is not None:
            level = GraphLevel.FULL if options.graphs else GraphLevel.NONE
            self.capabilities = replace(self.capabilities, attention_lse=True, graph_level=level)
            self.isa = native.name_of(self.kernels)
        elif not options.isa:
            _log.warning("anychip-cpu runs on plain PyTorch, several times slower: %s", native.REMEDY)
        self.threads = ThreadCount(
            limits,
            torch.set_num_threads if self.kernels is None else self.kernels.set_threads,
            asked=options.threads,
            most=int(os.environ.get("OMP_NUM_THREADS") or 0),
        )
        torch.set_num_threads(self.threads.threads)  # until weights are loaded: see measure()
        isa = native.REFERENCE if self.kernels is None else self.isa
        self._packed = weights_cache(options.packed_weights, options.packed_weights_gib, isa)

    def event(self) -> Event:
        self.threads.refresh()  # a step was issued, and the next one is still to come
        return super().event()

    def memory(self, device: int) -> MemoryInfo:
        info = meminfo()
        return MemoryInfo(free=info.get("MemAvailable"), total=info.get("MemTotal"))

    def kv_budget(self, profile: PeakMemory) -> int | None:
        """The host's memory is not ours alone: half of what is free, up to the option's limit."""
        most = int(self.cpu_options.kv_cache_gib * 2**30)
        free = meminfo().get("MemAvailable")
        return most if free is None else min(most, int((free - profile.nbytes) * _SHARE_OF_FREE_MEMORY))

    def measure(self, fn: Callable[[], Any]) -> PeakMemory:
        # Weights are loaded: what steps leave to torch is too small to share out, and two pools would wait on the same
        # cores.
        if self.kernels is not None:
            torch.set_num_threads(1)
        return peak_resident(fn)

    def allocate(self, nbytes: int, tag: str) -> Tensor:
        return zeroed(nbytes)

    def empty(self, shape: Sequence[int], dtype: str, tag: str) -> Tensor:
        kind = getattr(torch, dtype)
        nbytes = math.prod(shape) * kind.itemsize
        if nbytes < 2 * HUGE_PAGE:
            return super().empty(shape, dtype, tag)
        return zeroed(nbytes).view(kind).view(tuple(shape))

    def keep_weights(self, key: WeightsKey, storages: Sequence[UntypedStorage]) -> None:
        if self._packed is not None:
            self._packed.keep(key, storages)

    def restore_weights(self, key: WeightsKey, storages: Sequence[UntypedStorage]) -> bool:
        return self._packed is not None and self._packed.restore(key, storages)

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        return SdpaPagedAttention(spec) if self.kernels is None else CpuPagedAttention(spec, self.kernels, self.isa)

    def latent(self, spec: LatentSpec) -> LatentBackend:
        self.check(spec)
        rows = dense_part(spec)
        if self.kernels is None:
            return SparseLatent(spec, CpuLatent(rows)) if spec.index_dim else CpuLatent(spec)
        if rows.kv_dtype != rows.dtype:  # the kernels read rows of the queries' dtype
            return AnewLatent(CpuLatent(spec), self.recordings)
        return (KernelSparse if spec.index_dim else KernelLatent)(spec, self.kernels, self.isa)

    def state(self, spec: StateSpec) -> StateBackend:
        self.check(spec)
        if self.kernels is not None and has_kernel(spec):
            return CpuStates(spec, self.kernels, self.isa)
        return AnewStates(spec, self.recordings)

    def encoder(self, spec: EncoderSpec) -> EncoderBackend:
        self.check(spec)
        return SdpaEncoder(spec)

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        if self.kernels is None or not spec.gated:  # the kernels multiply gate and up
            return GroupedMoE(spec, self)
        if why_not(spec.scheme, spec.hidden_size) or why_not(spec.scheme, spec.intermediate_size):
            assert spec.scheme is not None, "panels hold plain weights"
            return WidenedMoE(spec, self, self.moe) if can_widen(spec.scheme) else GroupedMoE(spec, self)
        return CpuMoE(spec, self, self.kernels, self.isa)

    def linear(self, spec: LinearSpec) -> LinearKernel:
        self.check(spec)
        if self.kernels is None:
            return reference_linear(spec, self)
        if why_not(spec.scheme, spec.in_features):
            assert spec.scheme is not None, "panels hold plain weights"
            return WidenedLinear(spec, self, self.linear) if can_widen(spec.scheme) else reference_linear(spec, self)
        return CpuLinear(spec, self, self.kernels, self.isa)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return {"count_tokens": count_tokens} if self.kernels is None else CpuOps(self.kernels).overrides()

    def graph_capture(self) -> GraphCapture:
        return CpuGraphs(self.kernels, self.recordings) if self._records else GraphCapture()

    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        return RecordedShapes(limits) if self._records else ShapePolicy()

    @property
    def notes(self) -> Sequence[str]:
        if not self._records:
            why = "there are no compiled kernels" if self.kernels is None else "graphs=off"
            return [f"every step runs in Python, call by call: {why}"]
        return [
            f"steps run in Python, call by call, above {MOST_TOKENS} tokens, where ranks exchange values, and where a "
            "layer reads values on the host; others are recorded"
        ]

    @property
    def _records(self) -> bool:
        return self.capabilities.graph_level > GraphLevel.NONE

    def communicator(self, group: GroupSpec) -> Communicator:
        return communicator(group, self.kernels)
