"""anychip's plugin for Ascend NPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plugin_api import API_VERSION, PlatformManifest, Requirement, hookimpl
from anychip_ascend.options import AscendOptions, negotiate, worker_env

TORCH = ">=2.13,<2.14"
CANN = ">=8.5"
"""The wheel of 2.13 calls what CANN 8.5 brought; docs/how-to/ascend.md lists which belong together."""

REQUIREMENTS = (
    Requirement(kind="package", name="torch", range=TORCH, remedy="pip install 'torch>=2.13,<2.14'"),
    Requirement(
        kind="package",
        name="torch_npu",
        range=TORCH,
        remedy="pip install 'torch_npu>=2.13,<2.14': it must be of torch's own minor version",
    ),
    Requirement(
        kind="toolkit",
        name="CANN",
        range=CANN,
        probe="anychip_ascend.toolkit:cann_version",
        remedy="install CANN 8.5 or later, and run `source /usr/local/Ascend/ascend-toolkit/set_env.sh` in the shell "
        "that starts anychip",
    ),
)

MANIFEST = PlatformManifest(
    name="ascend",
    package="anychip-ascend",
    api_version=API_VERSION,
    summary="Ascend NPUs (310P, 910B, 910C, 950) through torch_npu: written against simulations, never run on a device",
    probe="anychip_ascend.probe:probe",
    platform="anychip_ascend.platform:AscendPlatform",
    seam="torch",
    topology="process_per_device",
    options=AscendOptions,
    requirements=REQUIREMENTS,
    negotiate=negotiate,
    worker_env=worker_env,
    ray_resource="NPU",
    runtime_imports=("torch_npu",),
    auto_select=False,  # it has never run on a device: who names it knows
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
