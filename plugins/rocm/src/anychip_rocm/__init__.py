"""anychip's plugin for AMD GPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plugin_api import API_VERSION, PlatformManifest, Requirement, hookimpl
from anychip_triton import TRITON
from anychip_triton.options import GpuOptions, gpu_limits

MANIFEST = PlatformManifest(
    name="rocm",
    package="anychip-rocm",
    api_version=API_VERSION,
    summary="AMD GPUs (gfx90a, gfx942, gfx950, gfx1100): Triton kernels, RCCL, HIP graphs; not run on hardware yet",
    probe="anychip_rocm.probe:probe",
    platform="anychip_rocm.platform:RocmPlatform",
    seam="torch",
    topology="process_per_device",
    options=GpuOptions,
    ray_resource="GPU",
    negotiate=gpu_limits,
    requirements=(
        Requirement(kind="package", name="torch", range=">=2.9", remedy="install torch's ROCm build, 2.9 or later"),
        TRITON,
    ),
    auto_select=False,  # until conformance has passed on a device, it is taken only by name
    priority=10,
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
