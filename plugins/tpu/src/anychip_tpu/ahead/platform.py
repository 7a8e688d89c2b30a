"""The plugin's platform over a slice that is not there."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from anychip.plugin_api import (
    AttentionBackend,
    AttentionSpec,
    FusedMoE,
    KVPlan,
    ModelSource,
    MoESpec,
    Platform,
    PlatformContext,
    StepLimits,
    StepRules,
)
from anychip_tpu.ahead.runtime import AheadRuntime
from anychip_tpu.ahead.topology import parse
from anychip_tpu.moe import make_moe
from anychip_tpu.pallas.backends import EmbeddedCalls, PallasAttention, PallasMoE
from anychip_tpu.platform import TpuPlatform
from anychip_tpu.program import TpuStepProgram
from anychip_tpu.shapes import BucketedShapes


class AheadPlatform(TpuPlatform):
    """Opened with devices that are named after their slice. Its kernels are those of Pallas."""

    def __init__(self, context: PlatformContext) -> None:
        Platform.__init__(self, context)
        self.topology = parse(context.probe.devices[0].detail)
        self.runtime = AheadRuntime(self.topology)
        self.on_host = False
        self.step_rules = StepRules()
        self._calls = EmbeddedCalls()

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        return PallasAttention(spec, self.runtime, self.topology.generation, self._calls)

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        if spec.scheme is not None or spec.num_experts % self.runtime.num_devices:
            return make_moe(spec, self, self.runtime)
        return PallasMoE(spec, self, self.runtime, self.topology.generation, self._calls)

    def _shapes(self, limits: StepLimits) -> BucketedShapes:
        # The attention kernel reads no more of a table than a row has.
        return BucketedShapes(limits, bucket_pages=False)

    def step_program(self, model: ModelSource, kv: KVPlan, limits: StepLimits) -> TpuStepProgram:
        program = TpuStepProgram(model, kv, limits, self.runtime, self._shapes(limits))
        # Tensors that core made on the device are fake ones there, and nobody moves them.
        for held in model.tensors(program.model):
            if isinstance(held.tensor, FakeTensor):
                torch.utils.swap_tensors(held.tensor, self.runtime.upload(held.tensor, held.placed))
        return program
