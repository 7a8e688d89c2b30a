"""anychip's plugin for TPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from anychip.config import EngineConfig
from anychip.plugin_api import API_VERSION, Placement, PlatformManifest, Requirement, hookimpl
from anychip_tpu.options import TpuOptions
from anychip_tpu.runtimes.choice import REMEDIES


def worker_env(config: EngineConfig, placement: Placement) -> Mapping[str, str]:
    """What the runtime reads as it is imported, where the user has not said it."""
    if os.environ.get("PJRT_DEVICE", "").upper() == "CPU":
        return {"CPU_NUM_DEVICES": str(len(placement.device_indexes))}
    return {} if "PJRT_DEVICE" in os.environ else {"PJRT_DEVICE": "TPU"}


MANIFEST = PlatformManifest(
    name="tpu",
    package="anychip-tpu",
    api_version=API_VERSION,
    summary="TPUs by torch_xla: whole steps compiled by XLA, devices divided by SPMD",
    probe="anychip_tpu.probe:probe",
    platform="anychip_tpu.platform:TpuPlatform",
    seam="step",
    topology="process_per_host",
    options=TpuOptions,
    requirements=(
        Requirement(kind="package", name="torch", range=">=2.9", remedy=REMEDIES["xla"]),
        Requirement(kind="package", name="torch_xla", range=">=2.9", remedy=REMEDIES["xla"], optional=True),
        Requirement(kind="package", name="torch_tpu", range=">=0.2", remedy=REMEDIES["torchtpu"], optional=True),
    ),
    auto_select=False,  # it has run on no TPU yet, only on the runtime's CPU devices
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
