"""The plugin of docs/writing-a-plugin.md runs as it stands there; the example runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def acme(tmp_path: Path) -> dict[str, str]:
    """An environment in which the page's package is installed."""
    page = (ROOT / "docs" / "writing-a-plugin.md").read_text()
    blocks = re.findall(r'```\w+ title="([^",]+)[^"]*"\n(.*?)```', page, flags=re.DOTALL)
    info = tmp_path / "anychip_acme-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: anychip-acme\nVersion: 0.1\n")
    for name, text in blocks:
        path = info / name if name == "entry_points.txt" else tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def run(arguments: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


def test_the_pages_plugin_is_found_and_runs_a_model(acme: dict[str, str]) -> None:
    cli = ["-m", "anychip.entrypoints.cli.main"]
    assert "anychip-acme" in run([*cli, "devices"], acme)
    assert "rms_norm: acme (anychip_acme.platform.rms_norm)" in run(
        [*cli, "doctor", "--device", "acme", "--hot-path"], acme
    )
    options = ["--prompt", "import numpy as", "--max-tokens", "4", "--temperature", "0"]
    texts = [run([*cli, "generate", "--device", device, *options], acme) for device in ("acme", "cpu")]
    assert texts[0] == texts[1]


def test_the_pages_plugin_passes_the_isolation_section(acme: dict[str, str]) -> None:
    suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "anychip_conformance.cases"]
    assert "4 passed" in run([*suite, "--device", "acme"], acme)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (
            "platform.py",
            "weight, eps, unit",
            "weight, eps, alpha, unit",
            "requires 'alpha', which op 'rms_norm' does not pass",
        ),
        ("platform.py", "import torch", "import acme_runtime", "No module named 'acme_runtime'"),
        ("__init__.py", "api_version=API_VERSION", "api_version='0.9'", "built against interface 0.9"),
        ("__init__.py", "from anychip.plugin_api", "from nowhere", "No module named 'nowhere'"),
    ],
)
def test_a_plugin_that_breaks_the_rules_ends_with_its_cause(acme, tmp_path, file, old, new, expected) -> None:
    source = tmp_path / "anychip_acme" / file
    source.write_text(source.read_text().replace(old, new))
    command = ["-m", "anychip.entrypoints.cli.main", "generate", "--device", "acme", "--prompt", "x"]
    done = subprocess.run([sys.executable, *command], env=acme, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    assert expected in done.stderr
    assert "anychip-acme" in done.stderr or "acme: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_example_runs() -> None:
    assert run([str(ROOT / "examples" / "generate.py")], dict(os.environ)).count("--- ") == 2
