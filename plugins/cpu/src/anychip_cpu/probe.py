"""Which CPUs are here. A host has one CPU device per tensor-parallel rank that asks for it: see platform.py."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from anychip.plugin_api import DeviceInfo, ProbeResult

MAX_RANKS = 16
"""Worker processes that may share the host, each a device to the core."""


def probe() -> ProbeResult:
    """Always finds the host. Each index is the same processor, with its share of the cores."""
    name = _processor_name()
    cores = available_cores()
    memory = total_memory()
    devices = tuple(
        DeviceInfo(
            index=index, name=name, total_memory=memory, detail=f"{cores} cores, shared by all ranks", backing="host"
        )
        for index in range(MAX_RANKS)
    )
    return ProbeResult(devices=devices, versions={"kernel": platform.release()})


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_by_node() -> list[int]:
    """Those cores, NUMA node by node."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(available_cores()))
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda node: int(node.name[4:]))
    ordered = [core for node in nodes for core in _listed(node / "cpulist") if core in allowed]
    return ordered + sorted(allowed - set(ordered))


def _listed(path: Path) -> list[int]:
    """Cores of a list such as 0-3,8."""
    ranges = [part.split("-") for part in path.read_text().strip().split(",") if part]
    return [core for bounds in ranges for core in range(int(bounds[0]), int(bounds[-1]) + 1)]


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
