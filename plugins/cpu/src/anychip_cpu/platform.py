"""CpuPlatform: the host as a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from anychip.plugin_api import (
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    Communicator,
    FusedMoE,
    GroupSpec,
    LinearKernel,
    LinearSpec,
    MemoryInfo,
    MoESpec,
    PeakMemory,
    Platform,
    PlatformContext,
)
from anychip_cpu import CpuOptions
from anychip_cpu.attention import SdpaPagedAttention
from anychip_cpu.communicator import GlooCommunicator
from anychip_cpu.graph import GraphCapture
from anychip_cpu.linear import reference_linear
from anychip_cpu.memory import peak_resident
from anychip_cpu.moe import GroupedMoE
from anychip_cpu.ops import OVERRIDES
from anychip_cpu.probe import meminfo

_SHARE_OF_FREE_MEMORY = 0.5


class CpuPlatform(Platform):
    capabilities = Capabilities(
        dtypes=frozenset({"float32", "bfloat16"}),
        collectives="runtime",
    )

    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        options = context.options
        assert isinstance(options, CpuOptions)
        self.cpu_options = options
        if options.threads:
            torch.set_num_threads(options.threads)

    def memory(self, device: int) -> MemoryInfo:
        info = meminfo()
        return MemoryInfo(free=info.get("MemAvailable"), total=info.get("MemTotal"))

    def kv_budget(self, profile: PeakMemory) -> int | None:
        """The host's memory is not ours alone: half of what is free, up to the option's limit."""
        most = int(self.cpu_options.kv_cache_gib * 2**30)
        free = meminfo().get("MemAvailable")
        return most if free is None else min(most, int((free - profile.nbytes) * _SHARE_OF_FREE_MEMORY))

    def measure(self, fn: Callable[[], Any]) -> PeakMemory:
        return peak_resident(fn)

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        return SdpaPagedAttention(spec)

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        return GroupedMoE(spec, self)

    def linear(self, spec: LinearSpec) -> LinearKernel:
        self.check(spec)
        return reference_linear(spec, self)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return OVERRIDES

    def graph_capture(self) -> GraphCapture:
        return GraphCapture()

    def communicator(self, group: GroupSpec) -> Communicator:
        return GlooCommunicator(group) if group.size > 1 else Communicator(group)
