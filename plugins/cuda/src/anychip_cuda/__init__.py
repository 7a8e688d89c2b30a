"""anychip's plugin for NVIDIA GPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from anychip.plugin_api import API_VERSION, Placement, PlatformManifest, Requirement, hookimpl
from anychip_triton import TRITON
from anychip_triton.options import GpuOptions, gpu_limits

if TYPE_CHECKING:
    from anychip.config import EngineConfig


def worker_env(config: EngineConfig, placement: Placement) -> Mapping[str, str]:
    """The driver's order of devices, which the probe has, instead of the fastest first. Where it makes no difference
    the worker needs no process of its own."""
    from anychip_cuda.probe import probe

    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len(probe().devices) == 1:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


MANIFEST = PlatformManifest(
    name="cuda",
    package="anychip-cuda",
    api_version=API_VERSION,
    summary="NVIDIA GPUs (compute capability 8.0 on): Triton kernels, cuBLAS, NCCL, graphs",
    probe="anychip_cuda.probe:probe",
    platform="anychip_cuda.platform:CudaPlatform",
    seam="torch",
    topology="process_per_device",
    options=GpuOptions,
    negotiate=gpu_limits,
    requirements=(Requirement(kind="package", name="torch", range=">=2.9", remedy="pip install 'torch>=2.9'"), TRITON),
    worker_env=worker_env,
    ray_resource="GPU",
    priority=10,
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
