"""What every result file says about where it came from."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> dict[str, object]:
    """Processor, cores, Python, and the versions that matter."""
    packages = {}
    for name in ("anychip", "torch", "numpy", "msgspec", "pyzmq"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": packages,
    }


def write(path: Path, document: dict[str, object]) -> None:
    """One result file: the figures, then the machine."""
    path.write_text(json.dumps({**document, "machine": machine()}, indent=1) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
