"""The suite's isolation section passes for every installed plugin, and the plugin is inert without --device."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("device", ["cpu", "cuda", "rocm", "tpu", "ascend", "fake-static"])
def test_isolation_passes(device: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "anychip_conformance.cases"]
    done = subprocess.run([*command, "--device", device], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "4 passed" in done.stdout
