"""The tools of a release."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ["CHANGELOG.md", "core/src/anychip/__init__.py", "core/pyproject.toml", "conformance/pyproject.toml"]
FILES += ["deploy/helm/anychip/Chart.yaml"]
FILES += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def bump(workspace: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "bump_version.py", version, "--root", workspace, "--date", "2027-01-02"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_command_sets_every_version(workspace):
    assert bump(workspace, "3.4.5").returncode == 0
    for name in FILES:
        text = (workspace / name).read_text()
        if name.endswith(".toml"):
            assert '\nversion = "3.4.5"\n' in text, name
            assert set(re.findall(r'"anychip(?:-\w+)?==(.+?)"', text)) <= {"3.4.5"}, name
    assert '__version__ = "3.4.5"' in (workspace / "core/src/anychip/__init__.py").read_text()
    assert "\n## 3.4.5 (2027-01-02)\n" in (workspace / "CHANGELOG.md").read_text()
    chart = (workspace / "deploy/helm/anychip/Chart.yaml").read_text()
    assert "\nversion: 3.4.5\n" in chart and "\nappVersion: 3.4.5\n" in chart


def test_a_chart_of_a_version_before_a_release_has_the_dash_that_helm_asks_for(workspace):
    assert bump(workspace, "3.4.5rc1").returncode == 0
    chart = (workspace / "deploy/helm/anychip/Chart.yaml").read_text()
    assert "\nversion: 3.4.5-rc1\n" in chart and "\nappVersion: 3.4.5rc1\n" in chart


def test_nothing_is_written_when_something_does_not_fit(workspace):
    path = workspace / "plugins/cpu/pyproject.toml"
    path.write_text(path.read_text().replace("version = ", "version  = ", 1))
    before = {name: (workspace / name).read_text() for name in FILES}
    done = bump(workspace, "3.4.5")
    assert done.returncode == 1
    assert "plugins/cpu/pyproject.toml is not at version" in done.stderr
    assert before == {name: (workspace / name).read_text() for name in FILES}


def test_what_is_no_version_is_refused(workspace):
    assert "is no version such as" in bump(workspace, "next").stderr
