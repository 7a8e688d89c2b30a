"""The plugin's platform over a slice that is not there."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from anychip.plugin_api import (
    KVPlan,
    ModelSource,
    Platform,
    PlatformContext,
    StepLimits,
    StepRules,
)
from anychip_tpu.ahead.runtime import AheadRuntime
from anychip_tpu.ahead.topology import parse
from anychip_tpu.pallas.backends import PallasKernels
from anychip_tpu.platform import TpuPlatform
from anychip_tpu.program import TpuStepProgram


class AheadPlatform(TpuPlatform):
    """Opened with devices that are named after their slice. Its kernels are those of Pallas."""

    def __init__(self, context: PlatformContext) -> None:
        Platform.__init__(self, context)
        self.topology = parse(context.probe.devices[0].detail)
        self.runtime = AheadRuntime(self.topology)
        self.on_host = False
        self.step_rules = StepRules()
        self.kernels = PallasKernels(self.runtime, self.topology.generation)

    def step_program(self, model: ModelSource, kv: KVPlan, limits: StepLimits) -> TpuStepProgram:
        program = TpuStepProgram(model, kv, limits, self.runtime, self._shapes(limits))
        # Tensors that core made on the device are fake ones there, and nobody moves them.
        for held in model.tensors(program.model):
            if isinstance(held.tensor, FakeTensor):
                torch.utils.swap_tensors(held.tensor, self.runtime.upload(held.tensor, held.placed))
        return program
