"""Which CPUs are here. A host has one CPU device per tensor-parallel rank that asks for it: see platform.py."""

from __future__ import annotations

import platform
from pathlib import Path

from anychip.plugin_api import DeviceInfo, ProbeResult
from anychip_cpu.limits import allowed_cores, cpu_limit, listed_cores

MAX_RANKS = 16
"""Worker processes that may share the host, each a device to the core."""


def probe() -> ProbeResult:
    """Always finds the host. Each index is the same processor, with its share of the cores."""
    name = _processor_name()
    limit = cpu_limit()
    memory = total_memory()
    devices = tuple(
        DeviceInfo(index=index, name=name, total_memory=memory, detail=f"{limit}; shared by all ranks", backing="host")
        for index in range(MAX_RANKS)
    )
    return ProbeResult(devices=devices, versions={"kernel": platform.release(), "may run": str(limit)})


def available_cores() -> int:
    """Cores that this process may use, and keep busy."""
    return cpu_limit().threads


def cores_by_node() -> list[int]:
    """Cores that this process may use, NUMA node by node."""
    allowed = allowed_cores()
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda node: int(node.name[4:]))
    ordered = [core for node in nodes for core in listed_cores((node / "cpulist").read_text()) if core in allowed]
    return ordered + sorted(allowed - set(ordered))


def total_memory() -> int | None:
    """Bytes of the host's memory."""
    return meminfo().get("MemTotal")


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; {} where there is none."""
    try:
        with open("/proc/meminfo") as lines:
            fields = (line.split(":") for line in lines)
            return {name: int(value.split()[0]) * 1024 for name, value in fields}
    except OSError:
        return {}


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
