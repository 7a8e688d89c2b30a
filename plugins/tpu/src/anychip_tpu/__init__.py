"""anychip's plugin for TPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plugin_api import API_VERSION, PlatformManifest, Requirement, hookimpl

MANIFEST = PlatformManifest(
    name="tpu",
    package="anychip-tpu",
    api_version=API_VERSION,
    summary="TPUs: announced, its kernels are not implemented yet",
    probe="anychip_tpu.probe:probe",
    platform="anychip_tpu.platform:TpuPlatform",
    seam="step",
    topology="process_per_host",
    requirements=(
        Requirement(kind="package", name="torch", range=">=2.9,<2.10", remedy="pip install 'torch>=2.9,<2.10'"),
        Requirement(
            kind="package",
            name="torch_xla",
            range=">=2.9",
            remedy="use an environment of its own: torch_xla 2.9.0 needs torch 2.9.0",
        ),
    ),
    auto_select=False,  # until its kernels exist, only who names it meets its refusal
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
