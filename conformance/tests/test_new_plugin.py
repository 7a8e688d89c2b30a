"""`anychip new-plugin` writes a package that is complete as it stands; the example in the repository is one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from packages import announce, anychip

from anychip.errors import ConfigError
from anychip_conformance.new_plugin import rendered, write_plugin

EXAMPLE = Path(__file__).parents[2] / "examples" / "anychip-acme"
CHANGED = {"src/anychip_acme/ops.py", "README.md", "tests/test_ops.py"}
"""What the example does beyond the template: one op."""
MOST_LINES = {"torch": 100, "step": 120}
SAMPLE = [f"--case={id}" for id in ("attn.decode.001", "linear.dense.001", "op.rms_norm.001", "e2e.greedy.001")]


PROMPT = ["--prompt", "import numpy as", "--max-tokens", "4", "--temperature", "0"]


@pytest.fixture(scope="module")
def expected() -> str:
    """What the host's own plugin makes of the prompt."""
    text = anychip(["generate", "--device", "cpu", *PROMPT]).stdout
    assert text
    return text


@pytest.mark.parametrize("seam", ["torch", "step"])
@pytest.mark.parametrize("judged", [SAMPLE, pytest.param(["--profile", "quick"], marks=pytest.mark.full)])
def test_a_generated_plugin_passes_as_it_is(tmp_path: Path, seam: str, judged: list[str], expected: str) -> None:
    folder = write_plugin("zeta", seam, tmp_path)
    sources = list((folder / "src").rglob("*.py"))
    assert sum(len(path.read_text().splitlines()) for path in sources) <= MOST_LINES[seam]
    announce(folder / "src", "anychip_zeta", "zeta")
    done = anychip(["conformance", "--device", "zeta", *judged], folder / "src")
    assert done.returncode == 0, done.stdout[-3000:]
    assert anychip(["generate", "--device", "zeta", *PROMPT], folder / "src").stdout == expected


@pytest.mark.parametrize("seam", ["torch", "step"])
def test_both_seams_make_the_same_tree(seam: str) -> None:
    files = rendered("zeta", seam)
    sources = [f"src/anychip_zeta/{module}.py" for module in ("__init__", "probe", "platform")]
    for path in ("pyproject.toml", "README.md", ".github/workflows/ci.yml", "tests/test_plugin.py", *sources):
        assert path in files
    families = {path for path in files if path.startswith("containers/")}
    assert len(families) == 5
    assert not any("$name" in text or "$Name" in text for text in files.values())
    assert "FROM ${BASE}" in files["containers/cuda.Containerfile"]


def test_the_example_is_as_generated_but_for_its_op() -> None:
    files = rendered("acme", "torch")
    there = {
        str(path.relative_to(EXAMPLE))
        for path in EXAMPLE.rglob("*")
        if path.is_file() and "__pycache__" not in str(path)
    }
    assert there - set(files) <= CHANGED
    for path, text in files.items():
        assert path in CHANGED or (EXAMPLE / path).read_text() == text, f"{path} differs from the template"


def test_each_seam_has_a_readme_of_its_own() -> None:
    torch, step = (rendered("zeta", seam)["README.md"] for seam in ("torch", "step"))
    assert "Replace op by op" in torch and "name torch's device" in torch
    assert "program.py" in step and "release(model)" in step and "op by op" not in step


@pytest.mark.parametrize("name", ["Acme", "2fast", "a-b", "", "acme/../x"])
def test_a_name_that_is_no_identifier_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="lower case"):
        write_plugin(name, "torch", tmp_path)


def test_a_folder_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write_plugin("zeta", "torch", tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        write_plugin("zeta", "step", tmp_path)
