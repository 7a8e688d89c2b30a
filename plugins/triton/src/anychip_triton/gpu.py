"""A GPU that PyTorch drives through torch.cuda, NVIDIA's or AMD's: memory, streams, faults, and what torch's builds for
either call by the same names. Vendors' own libraries are the plugins' affair."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import (
    Capabilities,
    Communicator,
    DeviceFault,
    DeviceProfile,
    Event,
    GraphCapture,
    GroupSpec,
    MemoryInfo,
    PeakMemory,
    PlatformContext,
    RegionCompiler,
    ShapePolicy,
    StepLimits,
    Unsupported,
)
from anychip.plugin_api.ops import COMPILED_OPS
from anychip_triton.attention import MAX_HEAD_DIM
from anychip_triton.communicator import NO_PIPELINE, RuntimeCommunicator
from anychip_triton.compiler import TorchCompiler
from anychip_triton.graph import DecodeShapes, DeviceGraphs
from anychip_triton.linear import EPILOGUES
from anychip_triton.options import GpuOptions
from anychip_triton.platform import TritonPlatform
from anychip_triton.profile import device_profile

_POLL_S = 0.002
_GONE = re.compile(r"illegal (memory )?access|device-side assert|unspecified launch failure|hardware exception", re.I)


class DeviceEvent(Event):
    """A point in the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def query(self) -> bool:
        return bool(self._event.query())


class GpuPlatform(TritonPlatform):
    def __init__(self, context: PlatformContext) -> None:
        torch.cuda.set_device(context.device_indexes[0])
        super().__init__(context)
        options = context.options
        assert isinstance(options, GpuOptions)
        if not options.chain:
            self.launch.target = replace(self.launch.target, chains=False)
        self._compiles = options.compile
        self._graphs = DeviceGraphs(self.launch.rehearsal) if options.graphs else GraphCapture()
        self.capabilities = Capabilities(
            dtypes=frozenset({"float32", "float16", "bfloat16"}),
            head_dims=frozenset(range(8, MAX_HEAD_DIM + 1)),
            epilogues=frozenset() if options.compile else EPILOGUES,  # activations are what the compiler is asked for
            graph_level=self._graphs.level,
            collectives="runtime",
            streams=True,
            lora=True,
        )

    def device(self, index: int) -> str:
        return f"cuda:{index}"

    def seed(self, n: int) -> None:
        super().seed(n)
        torch.cuda.manual_seed_all(n)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def event(self) -> DeviceEvent:
        return DeviceEvent()

    def memory(self, device: int) -> MemoryInfo:
        # What torch holds and does not use is as free as what the driver calls free.
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return MemoryInfo(free=free + kept, total=total)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def measure(self, fn: Callable[[], Any]) -> PeakMemory:
        with self.launch.rehearsal():
            fn()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return PeakMemory(nbytes=torch.cuda.max_memory_allocated() - before, exact=True)

    def graph_capture(self) -> GraphCapture:
        return self._graphs

    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        return DecodeShapes(limits) if self._graphs.level else ShapePolicy()

    def compiler(self) -> RegionCompiler | None:
        return TorchCompiler() if self._compiles else None

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        made = super().ops()
        return {name: op for name, op in made.items() if name not in COMPILED_OPS} if self._compiles else made

    def communicator(self, group: GroupSpec) -> Communicator:
        if group.size == 1:
            return Communicator(group)
        if group.purpose == "pp":
            raise Unsupported(self.name, [NO_PIPELINE])
        return RuntimeCommunicator(group, self.default_device)

    def profiler(self) -> contextlib.AbstractContextManager[DeviceProfile]:
        kinds = torch.profiler.ProfilerActivity
        return device_profile([kinds.CPU, kinds.CUDA])

    def health(self, deadline_s: float) -> None:
        event, until = DeviceEvent(), time.monotonic() + deadline_s
        while not event.query():
            if time.monotonic() > until:
                raise DeviceFault(
                    f"{self.default_device} has not finished its work within {deadline_s:g} s",
                    kind="timeout", fatal=True, remedy="a kernel may hang: restart the engine",
                )  # fmt: skip
            time.sleep(_POLL_S)

    def explain(self, exc: BaseException) -> DeviceFault | None:
        if isinstance(exc, torch.OutOfMemoryError):
            free, total = torch.cuda.mem_get_info()
            asked = re.search(r"allocate ([\d.]+ \w+)", str(exc))
            return DeviceFault(
                f"{self.default_device} is out of memory: {asked.group(1) if asked else 'what was asked'} asked, "
                f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB free",
                kind="out_of_memory", fatal=False,
                remedy="lower --max-num-batched-tokens or --memory-fraction, or end what else uses the device",
            )  # fmt: skip
        if isinstance(exc, RuntimeError) and _GONE.search(str(exc)):
            return DeviceFault(
                f"{self.default_device}: {str(exc).splitlines()[0]}", kind="illegal_access", fatal=True,
                remedy="restart the engine; the process cannot use the device any more",
            )  # fmt: skip
        return None

    def close(self, reason: str) -> None:
        self._graphs = GraphCapture()
        super().close(reason)
        torch.cuda.empty_cache()
