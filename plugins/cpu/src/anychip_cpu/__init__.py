"""anychip's plugin for host CPUs. This module announces the platform and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from anychip.plugin_api import API_VERSION, PlatformManifest, PluginOptions, Requirement, hookimpl


@dataclass(frozen=True, kw_only=True)
class CpuOptions(PluginOptions):
    threads: int = field(default=0, metadata={"help": "threads per worker; 0: the cores over the workers"})
    kv_cache_gib: float = field(default=4.0, metadata={"help": "most memory for the KV cache, in GiB"})


MANIFEST = PlatformManifest(
    name="cpu",
    package="anychip-cpu",
    api_version=API_VERSION,
    summary="host CPUs, PyTorch kernels",
    probe="anychip_cpu.probe:probe",
    platform="anychip_cpu.platform:CpuPlatform",
    options=CpuOptions,
    requirements=(Requirement(kind="package", name="torch", range=">=2.9", remedy="pip install 'torch>=2.9'"),),
    priority=0,
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
