"""TPUs, by their device files. Needs no libtpu to import, and no torch."""

from __future__ import annotations

from pathlib import Path

from anychip.plugin_api import DeviceInfo, ProbeResult

_DEV = Path("/dev")


def probe() -> ProbeResult:
    chips = sorted(_DEV.glob("accel[0-9]*")) or sorted((_DEV / "vfio").glob("[0-9]*"))
    if not chips:
        return ProbeResult(
            reason="no TPU (neither /dev/accel* nor /dev/vfio/* is there)",
            remedy="run on a TPU VM, and in a container with its devices passed in",
        )
    return ProbeResult(devices=tuple(DeviceInfo(index=i, name=f"TPU {chip.name}") for i, chip in enumerate(chips)))
