"""Plugin packages made on the spot, as installed ones look to the interpreter; the suite run on them, by its command
or without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anychip_conformance.registry import all_cases
from anychip_conformance.scorecard import Scorecard
from anychip_conformance.session import ConformanceRun, Settings

HOOKS = """
from anychip.plugin_api import API_VERSION, DeviceInfo, PlatformManifest, ProbeResult, hookimpl

def probe():
    return ProbeResult(devices=(DeviceInfo(index=0, name="made up", backing={backing!r}),))

@hookimpl
def anychip_platforms():
    return [PlatformManifest(name={name!r}, package="anychip-{name}", api_version=API_VERSION, summary="known bad",
                             probe="{module}:probe", platform="{module}.platform:BadPlatform")]
"""


def announce(folder: Path, module: str, name: str) -> None:
    """The metadata that makes folder/module a plugin."""
    info = folder / f"{module}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[anychip]\n{name} = {module}\n")


def make_bad(folder: Path, name: str, platform: str) -> None:
    """A package whose platform module is the given text. All but the one that lies about it say that they simulate."""
    module = f"anychip_{name}"
    backing = "hardware" if name == "fallback" else "simulated"
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(HOOKS.format(name=name, module=module, backing=backing))
    (folder / module / "platform.py").write_text(platform)
    announce(folder, module, name)


def anychip(arguments: list[str], path: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The `anychip` command, with a folder's packages installed."""
    environment = {**os.environ, **surroundings(path)}
    command = [sys.executable, "-m", "anychip.entrypoints.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def judged(settings: Settings, patch: pytest.MonkeyPatch, path: Path | None = None) -> tuple[Scorecard, bool]:
    """The scorecard, and whether the run succeeded. The device is judged in a process of its own, as always; only the
    command's two processes, which take seconds to start, are left out."""
    with patch.context() as here:
        for name, value in surroundings(path).items():
            here.setenv(name, value)
        if path is not None:
            here.syspath_prepend(path)
        run = ConformanceRun(settings)
        try:
            outcomes = [run.judged(case) for case in all_cases() if run.selects(case)]
            succeeded = run.finish(outcomes, run.facts)
        finally:
            run.close()
    assert run.card is not None
    return run.card, succeeded


def surroundings(path: Path | None) -> dict[str, str]:
    """The environment of processes to which a folder's packages are installed."""
    before = os.environ.get("PYTHONPATH")
    search = {} if path is None else {"PYTHONPATH": os.pathsep.join(filter(None, [str(path), before]))}
    return {"OMP_NUM_THREADS": "1", **search}
