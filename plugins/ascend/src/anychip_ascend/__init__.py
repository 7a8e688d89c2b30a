"""anychip's plugin for Ascend NPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plugin_api import API_VERSION, PlatformManifest, Requirement, hookimpl

MANIFEST = PlatformManifest(
    name="ascend",
    package="anychip-ascend",
    api_version=API_VERSION,
    summary="Ascend NPUs: announced, its kernels are not implemented yet",
    probe="anychip_ascend.probe:probe",
    platform="anychip_ascend.platform:AscendPlatform",
    seam="torch",
    topology="process_per_device",
    requirements=(
        Requirement(kind="package", name="torch", range=">=2.9", remedy="pip install 'torch>=2.9'"),
        Requirement(
            kind="package",
            name="torch_npu",
            range=">=2.9",
            remedy="pip install torch_npu, of torch's version",
        ),
    ),
    auto_select=False,  # until its kernels exist, only who names it meets its refusal
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
