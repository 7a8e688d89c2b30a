"""Ascend NPUs, by their device files. Needs no CANN to import, and no torch."""

from __future__ import annotations

from pathlib import Path

from anychip.plugin_api import DeviceInfo, ProbeResult

_DEV = Path("/dev")


def probe() -> ProbeResult:
    chips = sorted(_DEV.glob("davinci[0-9]*"))
    if not chips:
        return ProbeResult(
            reason="no Ascend NPU (no /dev/davinci* is there)",
            remedy="install the Ascend driver and firmware; in a container, pass /dev/davinci* and davinci_manager",
        )
    return ProbeResult(devices=tuple(DeviceInfo(index=i, name=f"NPU {chip.name}") for i, chip in enumerate(chips)))
