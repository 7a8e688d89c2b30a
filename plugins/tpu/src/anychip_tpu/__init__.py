"""anychip's plugin for TPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from anychip.plugin_api import (
    API_VERSION,
    CommandManifest,
    Decision,
    EngineConfig,
    Placement,
    PlatformManifest,
    ProbeResult,
    Requirement,
    hookimpl,
)
from anychip_tpu.options import TpuOptions
from anychip_tpu.runtimes.choice import REMEDIES, chosen_runtime, num_cpu_devices, on_cpu_devices


def worker_env(config: EngineConfig, placement: Placement) -> Mapping[str, str]:
    """What the runtime reads as it is imported, where the user has not said it."""
    if on_cpu_devices():
        wanted = len(placement.device_indexes)
        return {} if num_cpu_devices() == wanted else {"CPU_NUM_DEVICES": str(wanted)}
    return {} if "PJRT_DEVICE" in os.environ else {"PJRT_DEVICE": "TPU"}


def negotiate(config: EngineConfig, probed: ProbeResult) -> Decision:
    """torch_xla drives all of a host's devices from one process, torch_tpu one."""
    asked = dict(config.device_options).get("runtime", "auto")
    name, problem = chosen_runtime(asked, probed.versions)
    if name is None:
        return Decision(refuse=(problem,))
    if name == "xla":
        return Decision(topology="process_per_host")
    refused = (f"torch_tpu drives one device here; leave {config.parallel_sizes.settings} at 1",)
    return Decision(
        topology="process_per_device",
        refuse=refused if config.parallel_sizes.num_ranks > 1 else (),
        notes=("the runtime torch_tpu has never been run by this plugin; torch_xla has, on its CPU devices",),
    )


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
    negotiate=negotiate,
    worker_env=worker_env,
    ray_resource="TPU",
    requirements=(
        Requirement(kind="package", name="torch", range=">=2.9", remedy=REMEDIES["xla"]),
        Requirement(kind="package", name="torch_xla", range=">=2.9", remedy=REMEDIES["xla"], optional=True),
        Requirement(kind="package", name="torch_tpu", range=">=0.2", remedy=REMEDIES["torchtpu"], optional=True),
    ),
    auto_select=False,  # it has run on no TPU yet, only on the runtime's CPU devices
)


@hookimpl
def anychip_commands() -> Sequence[CommandManifest]:
    return [
        CommandManifest(
            name="tpu-compile",
            summary="compile a model's programs for a slice of TPUs that is not here",
            module="anychip_tpu.ahead.command",
        )
    ]


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
