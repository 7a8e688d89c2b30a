"""anychip's plugin for host CPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anychip.plugin_api import (
    API_VERSION,
    EngineConfig,
    Placement,
    PlatformManifest,
    PluginOptions,
    Requirement,
    hookimpl,
)
from anychip_cpu.probe import available_cores


@dataclass(frozen=True, kw_only=True)
class CpuOptions(PluginOptions):
    threads: int = field(default=0, metadata={"help": "threads per worker; 0: the cores over the workers"})
    kv_cache_gib: float = field(default=4.0, metadata={"help": "most memory for the KV cache, in GiB"})


def worker_env(config: EngineConfig, placement: Placement) -> Mapping[str, str]:
    """Workers on one host share its cores evenly."""
    if placement.world_size == 1 or "threads" in config.device_options:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, available_cores() // placement.world_size))}


MANIFEST = PlatformManifest(
    name="cpu",
    package="anychip-cpu",
    api_version=API_VERSION,
    summary="host CPUs, PyTorch kernels",
    probe="anychip_cpu.probe:probe",
    platform="anychip_cpu.platform:CpuPlatform",
    options=CpuOptions,
    worker_env=worker_env,
    requirements=(Requirement(kind="package", name="torch", range=">=2.9", remedy="pip install 'torch>=2.9'"),),
    priority=0,
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
