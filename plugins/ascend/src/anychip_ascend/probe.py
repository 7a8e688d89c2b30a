"""Ascend NPUs, by npu-smi where it is there, by their device files otherwise. Needs no CANN to import, and no torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from anychip.plugin_api import DeviceInfo, ProbeResult
from anychip_ascend.generations import generation_of
from anychip_ascend.toolkit import cann_version

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_DEV = Path("/dev")
_SMI = "npu-smi"
_DEADLINE_S = 10.0
_DRIVER = Path("/usr/local/Ascend/driver/version.info")

_FIRST = re.compile(r"^\|\s*(\d+)\s+(\S+)\s*\|\s*(\S+)\s*\|")
_SECOND = re.compile(r"^\|\s*\d+(?:\s+\d+)?\s*\|\s*[0-9A-Fa-f]{4}:[0-9A-Fa-f:.]+\s*\|(.*)\|")
_USAGE = re.compile(r"(\d+)\s*/\s*(\d+)")
"""npu-smi info has two lines for each device: its package, name and health; its chip, bus and memory in MB, of which
the last pair is used and total."""


def probe() -> ProbeResult:
    """The devices that a process started now would have, numbered as the runtime does."""
    files = sorted(_DEV.glob("davinci[0-9]*"), key=lambda path: int(re.sub(r"\D", "", path.name)))
    if not files:
        return ProbeResult(
            reason="no Ascend NPU (no /dev/davinci* is there)",
            remedy="install the Ascend driver and firmware; in a container, pass /dev/davinci*, /dev/davinci_manager, "
            "/dev/devmm_svm and /dev/hisi_hdc",
        )
    listed = listed_devices(_npu_smi())
    if len(listed) < len(files):  # npu-smi is missing, or does not see all
        listed += [DeviceInfo(index=i, name=f"NPU {files[i].name}") for i in range(len(listed), len(files))]
    chosen = visible(os.environ.get(VISIBLE), len(listed))
    if not chosen:
        return ProbeResult(
            reason=f"{VISIBLE}={os.environ.get(VISIBLE)!r} hides all {len(listed)} devices",
            remedy=f"unset {VISIBLE}, or name devices from 0 to {len(listed) - 1}",
            versions=_versions(),
        )
    devices = tuple(_renumbered(listed[at], index) for index, at in enumerate(chosen))
    return ProbeResult(devices=devices, versions=_versions())


def _renumbered(device: DeviceInfo, index: int) -> DeviceInfo:
    return DeviceInfo(index=index, name=device.name, total_memory=device.total_memory, detail=device.detail)


def visible(setting: str | None, count: int) -> list[int]:
    """The devices that a variable leaves, in the runtime's order: all without one; otherwise those that it names, up to
    the first that is not there."""
    if setting is None:
        return list(range(count))
    chosen: list[int] = []
    for part in filter(None, (part.strip() for part in setting.split(","))):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            break
        wanted = range(int(first), int(last or first) + 1)
        if any(index >= count or index in chosen for index in wanted):
            break
        chosen += wanted
    return chosen


def listed_devices(text: str) -> list[DeviceInfo]:
    """What `npu-smi info` prints, device by device. A line that it does not have leaves the memory open."""
    devices: list[DeviceInfo] = []
    head: re.Match[str] | None = None
    for line in text.splitlines():
        second = _SECOND.match(line) if head is not None else None
        if head is not None and second is not None:
            devices.append(_device(len(devices), head.group(2), head.group(3), second.group(1)))
            head = None
        else:
            head = _FIRST.match(line) or head
    return devices


def _device(index: int, chip: str, health: str, usage: str) -> DeviceInfo:
    generation = generation_of(chip)
    pairs = _USAGE.findall(usage)
    total = int(pairs[-1][1]) << 20 if pairs else 0
    detail = f"generation {generation.name}" if generation is not None else f"unknown generation {chip}"
    if health != "OK":
        detail += f", health {health}: see npu-smi info -t health"
    name = f"Ascend {chip.removeprefix('Ascend')}"
    return DeviceInfo(index=index, name=name, total_memory=total or None, detail=detail)


def _npu_smi() -> str:
    """ "" where the tool is missing, fails or hangs."""
    try:
        done = subprocess.run([_SMI, "info"], capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _versions() -> dict[str, str]:
    found = {"CANN": cann_version(), "driver": _driver_version(_DRIVER)}
    return {name: version for name, version in found.items() if version is not None}


def _driver_version(path: Path) -> str | None:
    try:
        lines: Sequence[str] = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition("=")[2].strip() for line in lines if line.lower().startswith("version=")), None)
