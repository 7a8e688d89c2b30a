"""Which runtime is installed, and which one to use. Imports neither."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from packaging.specifiers import SpecifierSet

RuntimeName = Literal["xla", "torchtpu"]

PACKAGES: Mapping[str, RuntimeName] = {"torch_tpu": "torchtpu", "torch_xla": "xla"}
"""By package. torch_tpu comes first: it is the successor, and follows torch's releases."""
TORCH: Mapping[RuntimeName, SpecifierSet] = {
    "xla": SpecifierSet(">=2.9,<2.10"),
    "torchtpu": SpecifierSet(">=2.11"),
}
"""The versions of torch that each runtime is built for."""
REMEDIES: Mapping[RuntimeName, str] = {
    "xla": "in an environment of its own: pip install 'torch>=2.9,<2.10' 'anychip-tpu[xla]'",
    "torchtpu": "in an environment of its own: pip install 'torch>=2.11' 'anychip-tpu[torchtpu]'",
}


def on_cpu_devices() -> bool:
    """Whether the runtime is asked for its CPU devices in place of chips."""
    return os.environ.get("PJRT_DEVICE", "").upper() == "CPU"


def num_cpu_devices() -> int:
    """How many of them there are."""
    return int(os.environ.get("CPU_NUM_DEVICES", "1"))


def installed_runtimes(versions: Mapping[str, str]) -> list[RuntimeName]:
    """Those whose package is there with a torch that fits. `versions` by package, "torch" among them."""
    torch = versions.get("torch", "")
    return [
        name
        for package, name in PACKAGES.items()
        if package in versions and torch and TORCH[name].contains(torch.partition("+")[0], prereleases=True)
    ]


def missing_runtime(versions: Mapping[str, str]) -> tuple[str, str]:
    """(reason, remedy) where no runtime can be used; empty strings where one can."""
    if installed_runtimes(versions):
        return "", ""
    for package, name in PACKAGES.items():
        if package in versions:
            torch = versions.get("torch", "none")
            return (
                f"{package} {versions[package]} needs torch {TORCH[name]}, and torch {torch} is installed",
                REMEDIES[name],
            )
    remedy = f"{REMEDIES['xla']}; or its successor, {REMEDIES['torchtpu']}"
    return "no runtime for TPUs: neither torch_xla nor torch_tpu is installed", remedy


def chosen_runtime(asked: str, versions: Mapping[str, str]) -> tuple[RuntimeName | None, str]:
    """(the runtime to open, why it cannot be): one of both. `asked` is "auto" or a runtime's name."""
    there = installed_runtimes(versions)
    if asked == "auto":
        return (there[0], "") if there else (None, missing_runtime(versions)[0])
    for name in TORCH:
        if asked == name:
            return (name, "") if name in there else (None, f"runtime {name} is not installed; {REMEDIES[name]}")
    return None, f"runtime={asked}: choose auto, {', '.join(TORCH)}"
