"""TPUs by their device files, or the runtime's CPU devices where PJRT_DEVICE asks for those. Needs no libtpu to import,
and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from anychip.plugin_api import DeviceInfo, ProbeResult
from anychip_tpu.runtimes.choice import PACKAGES, missing_runtime, num_cpu_devices, on_cpu_devices

_DEV = Path("/dev")


def probe() -> ProbeResult:
    versions = dict(_installed())
    reason, remedy = missing_runtime(versions)
    if reason:
        return ProbeResult(reason=reason, remedy=remedy, versions=versions)
    if on_cpu_devices():
        devices = (
            DeviceInfo(index=i, name="PJRT's CPU device", detail="PJRT_DEVICE=CPU", backing="cpu_runtime")
            for i in range(num_cpu_devices())
        )
        return ProbeResult(devices=tuple(devices), versions=versions)
    chips = sorted(_DEV.glob("accel[0-9]*")) or sorted((_DEV / "vfio").glob("[0-9]*"))
    if not chips:
        return ProbeResult(
            reason="no TPU (neither /dev/accel* nor /dev/vfio/* is there)",
            remedy="run on a TPU VM, and in a container with its devices passed in; PJRT_DEVICE=CPU runs the same "
            "programs on the host",
            versions=versions,
        )
    named = (DeviceInfo(index=i, name=f"TPU {chip.name}") for i, chip in enumerate(chips))
    return ProbeResult(devices=tuple(named), versions=versions)


def _installed() -> Mapping[str, str]:
    found = {}
    for package in ("torch", *PACKAGES, "libtpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
