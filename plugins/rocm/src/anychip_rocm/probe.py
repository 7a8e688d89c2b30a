"""AMD devices, read from the kernel driver's topology. Needs no HIP to import, and no torch."""

from __future__ import annotations

import os
from pathlib import Path

from anychip.plugin_api import DeviceInfo, ProbeResult
from anychip_triton.visibility import visible

_DRIVER = Path("/dev/kfd")
_VISIBLE = "ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES"
_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


def probe() -> ProbeResult:
    if not _DRIVER.exists():
        return ProbeResult(
            reason=f"no AMD compute driver ({_DRIVER} is not there)",
            remedy=f"install ROCm's kernel driver; in a container, pass {_DRIVER} and /dev/dri",
        )
    nodes = [
        _properties(node / "properties") for node in sorted(_NODES.glob("[0-9]*"), key=lambda path: int(path.name))
    ]
    gpus = [node for node in nodes if node.get("gfx_target_version")]
    seen = gpus
    for setting in _settings():
        seen = [seen[index] for index in visible(setting, [_uuid(node) for node in seen])]
    devices = tuple(
        DeviceInfo(index=index, name=_target(node["gfx_target_version"])) for index, node in enumerate(seen)
    )
    none = f"{_VISIBLE} hides all {len(gpus)} devices" if gpus else "the driver lists no GPU"
    return ProbeResult(
        devices=devices,
        reason="" if devices else none,
        remedy="" if devices else f"check {_VISIBLE}, and rocminfo",
    )


def _settings() -> tuple[str | None, str | None]:
    """The driver's runtime's, which hides all where it is empty; and HIP's, which counts among what that leaves and
    takes an empty one for none."""
    hip = os.environ.get("HIP_VISIBLE_DEVICES") or os.environ.get("CUDA_VISIBLE_DEVICES")
    return os.environ.get("ROCR_VISIBLE_DEVICES"), hip or None


def _uuid(node: dict[str, int]) -> str:
    """As rocminfo prints it."""
    return f"GPU-{node.get('unique_id', 0):016x}"


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
