"""anychip's plugin for NVIDIA GPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plugin_api import API_VERSION, PlatformManifest, Requirement, hookimpl

MANIFEST = PlatformManifest(
    name="cuda",
    package="anychip-cuda",
    api_version=API_VERSION,
    summary="NVIDIA GPUs: announced, its kernels are not implemented yet",
    probe="anychip_cuda.probe:probe",
    platform="anychip_cuda.platform:CudaPlatform",
    seam="torch",
    topology="process_per_device",
    requirements=(Requirement(kind="package", name="torch", range=">=2.9", remedy="pip install 'torch>=2.9'"),),
    visible_devices_env="CUDA_VISIBLE_DEVICES",
    auto_select=False,  # until its kernels exist, only who names it meets its refusal
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
