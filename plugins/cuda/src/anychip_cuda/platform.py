"""CudaPlatform: Triton kernels, NCCL, CUDA graphs; cuBLAS, through torch, for dense products of many rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from anychip.plugin_api import PlatformContext, Unsupported
from anychip_triton.gpu import GpuPlatform
from anychip_triton.targets import Target, cuda_target


class CudaPlatform(GpuPlatform):
    def __init__(self, context: PlatformContext) -> None:
        if torch.version.cuda is None:
            raise Unsupported(
                "anychip-cuda", [f"torch {torch.__version__} is not built for CUDA; install torch's CUDA build"]
            )
        super().__init__(context)

    def find_target(self) -> Target:
        index = self.context.device_indexes[0]
        major, minor = torch.cuda.get_device_capability(index)
        target = cuda_target(major, minor)
        if target is None:
            name = torch.cuda.get_device_name(index)
            raise Unsupported(
                "anychip-cuda", [f"{name} has compute capability {major}.{minor}; kernels are made for 8.0 and later"]
            )
        return target

    def made_with(self) -> Mapping[str, str]:
        return {**super().made_with(), "cuda": str(torch.version.cuda)}
