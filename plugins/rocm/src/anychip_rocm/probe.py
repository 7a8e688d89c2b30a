"""AMD devices, read from the kernel driver's topology. Needs no HIP to import, and no torch."""

from __future__ import annotations

import os
from pathlib import Path

from anychip.plugin_api import DeviceInfo, ProbeResult

_DRIVER = Path("/dev/kfd")
_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


def probe() -> ProbeResult:
    if not _DRIVER.exists():
        return ProbeResult(
            reason=f"no AMD compute driver ({_DRIVER} is not there)",
            remedy=f"install ROCm's kernel driver; in a container, pass {_DRIVER} and /dev/dri",
        )
    nodes = [_properties(node / "properties") for node in sorted(_NODES.glob("*"), key=lambda path: path.name)]
    targets = [_target(node["gfx_target_version"]) for node in nodes if node.get("gfx_target_version")]
    seen = targets
    for name in _VISIBLE:  # the second counts among those that the first leaves
        seen = _named(os.environ.get(name), seen)
    devices = tuple(DeviceInfo(index=index, name=target) for index, target in enumerate(seen))
    none = f"{' or '.join(_VISIBLE)} hides all {len(targets)} devices" if targets else "the driver lists no GPU"
    return ProbeResult(
        devices=devices,
        reason="" if devices else none,
        remedy="" if devices else f"check {' and '.join(_VISIBLE)}, and rocminfo",
    )


def _named(setting: str | None, targets: list[str]) -> list[str]:
    """Those that a setting names by number, up to the first that does not exist; all without a setting."""
    if setting is None:
        return targets
    chosen: list[str] = []
    for name in setting.split(","):
        if not name.strip().isdigit() or int(name) >= len(targets):
            break
        chosen.append(targets[int(name)])
    return chosen


def _properties(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except (OSError, ValueError):
        return {}


def _target(version: int) -> str:
    """90402 is gfx942: major, minor and stepping as two decimal digits each, the last two in hexadecimal."""
    major, minor, step = version // 10000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{step:x}"
