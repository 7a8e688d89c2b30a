"""A plugin as it was built against the interface before this one: `interface-0.1` has its wheel, which nobody builds
again. It runs where the change does not touch it, and is told what to change where it does."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from packages import anychip

WHEEL = next((Path(__file__).parent / "interface-0.1").glob("*.whl"))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the wheel's content, as an installation has it."""
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(tmp_path)
    return tmp_path


def test_a_plugin_of_kernels_is_served_as_it_is(installed: Path):
    assert 'api_version="0.1"' in (installed / "anychip_acme" / "__init__.py").read_text()
    done = anychip(["conformance", "--device", "acme", "--case", "op.rms_norm", "--case", "step.drafts"], installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass" in done.stdout and "fail" not in done.stdout


def test_a_shape_policy_is_told_what_to_change(installed: Path):
    platform = next(path for path in (installed / "anychip_acme").glob("*.py") if "(Platform)" in path.read_text())
    platform.write_text(
        platform.read_text()
        + """

from anychip.plugin_api import ShapePolicy


class OldShapes(ShapePolicy):
    def bucket(self, *, num_tokens, num_reqs, max_query_len, num_pages, features):
        raise AssertionError("it is never asked")


AcmePlatform.shape_policy = lambda self, limits: OldShapes()
"""
    )
    done = anychip(["generate", "--device", "acme", "--prompt", "x", "--max-tokens", "2"], installed)
    assert done.returncode != 0
    assert "OldShapes.bucket takes no num_samples, which interface 0.2 added" in done.stderr
    assert "docs/reference/versioning.md" in done.stderr and "Traceback" not in done.stderr


def test_a_step_program_is_told_what_to_change(installed: Path):
    hooks = installed / "anychip_acme" / "__init__.py"
    hooks.write_text(hooks.read_text().replace('seam="torch"', 'seam="step"'))
    done = anychip(["generate", "--device", "acme", "--prompt", "x"], installed)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "its step program was written against interface 0.1" in done.stderr
