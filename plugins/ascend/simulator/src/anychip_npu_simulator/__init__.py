"""A simulated Ascend NPU in host memory, under the vendor's own torch_npu. For tests: a simulation, never a run.

This module announces the platform `ascend-simulated`, which is anychip-ascend over the simulator, and imports nothing
heavy. What is simulated and how is in README.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from anychip.plugin_api import (
    API_VERSION,
    DeviceInfo,
    PlatformManifest,
    ProbeResult,
    Requirement,
    hookimpl,
)
from anychip_ascend.options import AscendOptions, negotiate, worker_env

_WHEEL = Requirement(
    kind="package",
    name="torch_npu",
    range=">=2.13,<2.14",
    remedy="make ascend-venv, which installs torch 2.13.0 and torch_npu 2.13.0 into an environment of their own",
)


def probe() -> ProbeResult:
    """As many devices as NPU_SIMULATOR_DEVICES says."""
    count = int(os.environ.get("NPU_SIMULATOR_DEVICES") or 1)
    return ProbeResult(
        devices=tuple(DeviceInfo(index=i, name="simulated NPU", backing="simulated") for i in range(count))
    )


SIMULATED = PlatformManifest(
    name="ascend-simulated",
    package="anychip-npu-simulator",
    api_version=API_VERSION,
    summary="simulation: anychip-ascend over torch_npu and a simulated CANN in host memory, for tests; slow",
    probe="anychip_npu_simulator:probe",
    platform="anychip_npu_simulator.platform:SimulatedAscendPlatform",
    seam="torch",
    topology="process_per_device",
    options=AscendOptions,
    requirements=(_WHEEL,),
    negotiate=negotiate,
    worker_env=worker_env,
    runtime_imports=("anychip_npu_simulator.runtime",),
    auto_select=False,
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [SIMULATED]
