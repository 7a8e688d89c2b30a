"""Result files: the figures, what was run, and the machine; and their plots."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from anychip.errors import ConfigError

_PACKAGES = ("anychip", "torch", "transformers", "numpy", "msgspec", "pyzmq")


def machine() -> dict[str, Any]:
    """Processor, cores, Python, and the versions that matter."""
    packages = {}
    for name in _PACKAGES:
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


def write(path: Path, document: Mapping[str, Any]) -> None:
    """One result file."""
    path.write_text(json.dumps({**document, "machine": machine()}, indent=1) + "\n")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """mean, p50, p90, p99 and max, by nearest rank; {} of nothing."""
    if not values:
        return {}
    ordered = sorted(values)

    def rank(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    return {
        "mean": sum(ordered) / len(ordered),
        "p50": rank(0.5),
        "p90": rank(0.9),
        "p99": rank(0.99),
        "max": ordered[-1],
    }


def plot(path: Path, title: str, samples: Mapping[str, Sequence[float]], unit: str) -> None:
    """A picture of each sample's distribution: the share of values at or below each. Raises ConfigError without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install anychip[bench]") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, values in samples.items():
        ordered = sorted(values)
        if not ordered:
            continue
        axes.step(ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))], where="post", label=label)
    axes.set(title=title, xlabel=unit, ylabel="share of values at or below", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_rates(path: Path, title: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """A picture of a server at several arrival rates: what it delivers, and how long a first token takes. Raises
    ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install anychip[bench]") from error
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = [run["rate"] for run in runs]
    left.plot(rates, rates, color="0.7", linestyle=":", label="arriving")
    left.plot(rates, [run["requests_per_s"] for run in runs], marker="o", label="answered")
    if all("goodput_requests_per_s" in run for run in runs):
        left.plot(rates, [run["goodput_requests_per_s"] for run in runs], marker="s", label="within the SLO")
    left.set(title=title, xlabel="requests a second", ylabel="requests a second", xlim=(0, None), ylim=(0, None))
    for share in ("p50", "p99"):
        right.plot(rates, [run["first_token_s"].get(share) for run in runs], marker="o", label=share)
    right.set(title="to the first token", xlabel="requests a second", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
