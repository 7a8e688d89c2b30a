"""The measurements of the host run on the present code, however small: nothing else notices when they no longer do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALLEST = (
    ["admission.py"],
    ["api_delivery.py", "--tokens", "2000"],
    ["api_stalls.py", "--streams", "2", "--repeats", "1"],
    ["engine_overhead.py", "--repeats", "1"],
    ["penalties.py", "--repeats", "1"],
    ["streams.py", "--streams", "4", "--tokens", "4", "--rounds", "1"],
    ["structured.py", "--rounds", "1", "--tokens", "4"],
)


@pytest.mark.full
@pytest.mark.parametrize("command", SMALLEST, ids=lambda command: command[0])
def test_a_benchmark_runs(command: list[str], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / command[0]), *command[1:], "--output", str(output)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and output.exists(), done.stderr[-3000:]
