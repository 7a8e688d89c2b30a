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
from anychip_cpu.native import REMEDY
from anychip_cpu.probe import cores_by_node


@dataclass(frozen=True, kw_only=True)
class CpuOptions(PluginOptions):
    threads: int = field(
        default=0, metadata={"help": "threads per worker; 0: what affinity, cpuset and quota allow, over the workers"}
    )
    isa: str = field(
        default="",
        metadata={"help": "kernels to use: avx512_amx, avx512_bf16, avx512, avx2, generic, reference; '': the fastest"},
    )
    graphs: bool = field(default=True, metadata={"help": "record small steps, and make their kernel calls together"})
    packed_weights: str = field(
        default="on",
        metadata={
            "help": "packed weights on disk, for faster starts: on (in the user's cache folder), off, or a folder"
        },
    )
    packed_weights_gib: float = field(
        default=20.0, metadata={"help": "most of the disk for packed weights, in GiB; the least used files go first"}
    )
    kv_cache_gib: float = field(default=4.0, metadata={"help": "most memory for the KV cache, in GiB"})


CORES_VARIABLE = "ANYCHIP_CPU_CORES"
"""Of a worker process: the cores that it binds itself to."""
RANKS_VARIABLE = "ANYCHIP_CPU_RANKS"
"""Of a worker process: how many share the host, and with it a quota."""


def worker_env(config: EngineConfig, placement: Placement) -> Mapping[str, str]:
    """Workers on one host share its cores evenly, each within as few NUMA nodes as that allows."""
    ranks = placement.world_size
    if ranks == 1:
        return {}
    shared = {RANKS_VARIABLE: str(ranks)}
    if "threads" in config.device_options:
        return shared
    cores = cores_by_node()
    share = cores[placement.rank * len(cores) // ranks :][: max(1, len(cores) // ranks)]
    # With more ranks than cores nobody is bound: the scheduler spreads them better than a rule.
    bound = {CORES_VARIABLE: ",".join(map(str, share))} if len(cores) >= ranks else {}
    return {"OMP_NUM_THREADS": str(max(1, len(share))), **shared, **bound}


MANIFEST = PlatformManifest(
    name="cpu",
    package="anychip-cpu",
    api_version=API_VERSION,
    summary="host CPUs",
    probe="anychip_cpu.probe:probe",
    platform="anychip_cpu.platform:CpuPlatform",
    options=CpuOptions,
    worker_env=worker_env,
    requirements=(
        Requirement(kind="package", name="torch", range=">=2.9", remedy="pip install 'torch>=2.9'"),
        Requirement(
            kind="tool",
            name="compiled kernels",
            probe="anychip_cpu.native:version",
            remedy=f"plain PyTorch serves, several times slower: {REMEDY}",
            optional=True,
        ),
    ),
    priority=0,
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [MANIFEST]
