"""RocmPlatform: Triton kernels, RCCL, HIP graphs; hipBLASLt, through torch, for dense products of many rows.

Not run on hardware yet: kernels compile for gfx90a, gfx942, gfx950 and gfx1100, and are judged in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from anychip.plugin_api import PlatformContext, Unsupported
from anychip_triton.gpu import GpuPlatform
from anychip_triton.targets import TARGETS, Target, hip_target


class RocmPlatform(GpuPlatform):
    def __init__(self, context: PlatformContext) -> None:
        if torch.version.hip is None:
            raise Unsupported(
                "anychip-rocm", [f"torch {torch.__version__} is not built for ROCm; install torch's ROCm build"]
            )
        super().__init__(context)

    def find_target(self) -> Target:
        name = torch.cuda.get_device_properties(self.context.device_indexes[0]).gcnArchName
        target = hip_target(name)
        if target is None:
            known = ", ".join(target.name for target in TARGETS.values() if target.backend == "hip")
            raise Unsupported("anychip-rocm", [f"{name} is none of the targets that kernels are made for: {known}"])
        return target

    def made_with(self) -> Mapping[str, str]:
        return {**super().made_with(), "hip": str(torch.version.hip)}
