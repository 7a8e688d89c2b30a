"""TpuPlatform: whole steps compiled by XLA. Its kernel factories give what the step program traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from anychip.plugin_api import (
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    FusedMoE,
    KVPlan,
    LinearKernel,
    LinearSpec,
    MemoryInfo,
    ModelSource,
    MoESpec,
    PeakMemory,
    Platform,
    PlatformContext,
    ShapePolicy,
    StepLimits,
    StepProgram,
    StepRules,
    Unsupported,
)
from anychip_tpu import ops
from anychip_tpu.attention import BLOCK_SIZES, PagedAttention
from anychip_tpu.linear import SCHEMES, make_linear
from anychip_tpu.moe import make_moe
from anychip_tpu.options import TpuOptions
from anychip_tpu.program import TpuStepProgram
from anychip_tpu.runtimes import Runtime
from anychip_tpu.runtimes.choice import chosen_runtime
from anychip_tpu.shapes import GROWTH, BucketedShapes

if TYPE_CHECKING:
    from anychip_tpu.pallas.backends import PallasKernels

if TYPE_CHECKING:
    pass

_HOST_KV_BYTES = 256 << 20
"""Of the KV cache on the CPU runtime, which does not say what memory it has."""
_HOST_TOKENS, _HOST_ROWS = 64, 16
"""Of a step on the CPU runtime, where programs are small so that they compile in seconds."""
_HOST_GROWTH = 4
"""From bucket to bucket there: few programs matter more than padding."""


class TpuPlatform(Platform):
    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        assert isinstance(context.options, TpuOptions)
        self.runtime = open_runtime(context.options, context)
        self.on_host = all(device.backing != "hardware" for device in context.probe.devices)
        self.step_rules = StepRules(max_tokens=_HOST_TOKENS, max_rows=_HOST_ROWS) if self.on_host else StepRules()
        self.kernels = None if self.on_host else chip_kernels(self.runtime)

    capabilities = Capabilities(
        dtypes=frozenset({"float32", "bfloat16"}),
        kv_dtypes=frozenset({"float32", "bfloat16", "float8_e4m3fn", "int8"}),
        quantization=SCHEMES,
        block_sizes=BLOCK_SIZES,
        slot_dtype="int32",
        kv_write="functional",
        attention_lse=True,
        stale_kv="must_be_finite",
        collectives="compiler",
        reload="none",
    )

    # -- devices and memory -------------------------------------------------------------------------------

    def device(self, index: int) -> str:
        return self.runtime.torch_device

    @property
    def weights_device(self) -> str:
        return "cpu"  # they arrive in pieces, and each piece written on a device would be a program of its own

    def synchronize(self) -> None:
        self.runtime.synchronize()

    def memory(self, device: int) -> MemoryInfo:
        return self.runtime.memory(device)

    def kv_budget(self, profile: PeakMemory) -> int | None:
        return _HOST_KV_BYTES if self.on_host else None

    # -- kernels ------------------------------------------------------------------------------------------

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        if self.kernels is not None:
            with contextlib.suppress(Unsupported):
                return self.kernels.attention(spec)
        return PagedAttention(spec)

    def linear(self, spec: LinearSpec) -> LinearKernel:
        self.check(spec)
        return make_linear(spec, self, self.runtime)

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        if self.kernels is not None:
            with contextlib.suppress(Unsupported):
                return self.kernels.moe(spec, self)
        return make_moe(spec, self, self.runtime)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return ops.overrides()

    # -- steps --------------------------------------------------------------------------------------------

    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        return self._shapes(limits)

    def _shapes(self, limits: StepLimits) -> BucketedShapes:
        # The attention kernel reads no more of a table than a row has.
        growth = _HOST_GROWTH if self.on_host else GROWTH
        return BucketedShapes(limits, bucket_pages=self.kernels is None, growth=growth)

    def step_program(self, model: ModelSource, kv: KVPlan, limits: StepLimits) -> StepProgram:
        return TpuStepProgram(model, kv, limits, self.runtime, self._shapes(limits))


def chip_kernels(runtime: Runtime) -> PallasKernels | None:
    """The kernels of the chip that a runtime drives; None where jax, which writes them, is not installed, or the chip
    is of no generation that they know."""
    try:
        from anychip_tpu.pallas.backends import PallasKernels
        from anychip_tpu.pallas.generations import by_device_kind
    except ImportError:
        return None
    chip = by_device_kind(runtime.device_kind)
    return None if chip is None else PallasKernels(runtime, chip)


def open_runtime(options: TpuOptions, context: PlatformContext) -> Runtime:
    """Raises Unsupported where the runtime asked for is not there."""
    name, problem = chosen_runtime(options.runtime, context.probe.versions)
    if name is None:
        raise Unsupported("anychip-tpu", [problem])
    if name == "xla":
        from anychip_tpu.runtimes.xla import XlaRuntime

        return XlaRuntime(len(context.device_indexes), options.cache_folder)
    from anychip_tpu.runtimes.torchtpu import TorchTpuRuntime

    return TorchTpuRuntime(context.device_indexes[0])
