"""What the documents show runs as it stands there: the plugin, the model family, the examples."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


TUTORIAL = (ROOT / "docs" / "writing-a-plugin.md").read_text()


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the tutorial was followed, and what its commands printed. `pip install` is replaced by the
    metadata that it would write: the tests share one environment."""
    folder = tmp_path_factory.mktemp("tutorial")
    source = folder / "anychip-acme" / "src"
    printed = ""
    for language, title, text in re.findall(r'```(\w+) title="([^"]+)"\n(.*?)```', TUTORIAL, flags=re.DOTALL):
        if language == "python":
            (folder / title).write_text(text)
            continue
        done = subprocess.run(
            ["bash", "-euc", text],
            cwd=folder,
            env=acme_environment(source),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, text + done.stdout[-2000:] + done.stderr[-2000:]
        printed += done.stdout
        info = source / "anychip_acme-0.1.0.dist-info"
        if not info.exists():
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: anychip-acme\nVersion: 0.1.0\n")
            (info / "entry_points.txt").write_text("[anychip]\nacme = anychip_acme\n")
    return folder, printed


def acme_environment(source: Path) -> dict[str, str]:
    path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PATH": commands}


@pytest.fixture
def acme(followed: tuple[Path, str], tmp_path: Path) -> dict[str, str]:
    """An environment with a copy of the tutorial's package, which a test may break."""
    shutil.copytree(followed[0] / "anychip-acme" / "src", tmp_path, dirs_exist_ok=True)
    return acme_environment(tmp_path)


def run(arguments: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


def test_the_tutorial_does_what_it_says(followed: tuple[Path, str]) -> None:
    printed = followed[1]
    assert "anychip-acme" in printed
    assert "not_supported" in printed and printed.count("pass") >= 2 and "fail" not in printed
    assert "rms_norm: acme (anychip_acme.ops.rms_norm)" in printed
    assert "every layer is within its bound" in printed


def test_the_tutorials_failure_is_what_the_suite_says(acme: dict[str, str], tmp_path: Path) -> None:
    ops = tmp_path / "anychip_acme" / "ops.py"
    ops.write_text(ops.read_text().replace("weight.float() + 1 if", "weight.float() if"))
    command = [sys.executable, "-m", "anychip.entrypoints.cli.main", "conformance", "--device", "acme"]
    done = subprocess.run([*command, "--case", "op.rms_norm.004"], env=acme, capture_output=True, text=True)
    shown = re.search(r"```text\n(.*?)```", TUTORIAL, flags=re.DOTALL)
    assert shown is not None and done.returncode == 1
    assert shown[1] in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (
            "ops.py",
            "weight, eps, unit",
            "weight, eps, alpha, unit",
            "requires 'alpha', which op 'rms_norm' does not pass",
        ),
        ("ops.py", "import torch.nn.functional as F", "import acme_runtime", "No module named 'acme_runtime'"),
        ("__init__.py", 'api_version="0.2"', 'api_version="0.9"', "built against interface 0.9"),
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


@pytest.mark.parametrize("example", ["generate", "batch", "stream", "quantize"])
def test_an_example_runs(example: str) -> None:
    assert run([str(ROOT / "examples" / f"{example}.py")], dict(os.environ)).count("--- ") >= 2


@pytest.mark.full
def test_a_strict_type_checker_is_content_with_who_uses_the_library(tmp_path: Path) -> None:
    """As an installed package, of which only py.typed says that it has types."""
    program = tmp_path / "downstream.py"
    program.write_text((ROOT / "examples" / "batch.py").read_text() + WRONG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if "error" in line]
    assert len(errors) == 2, done.stdout
    assert 'Argument "max_tokens" to "SamplingParams" has incompatible type "str"' in errors[0]


WRONG = """

def wrong() -> None:
    from anychip import SamplingParams

    SamplingParams(max_tokens="many")
"""

FOLLOW = """
import sys
from pathlib import Path

from anychip_conformance.equality import tiny_models
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts

folder = Path(sys.argv[1])
model = tiny_models.make_checkpoint("smollm3", folder)
answers = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts()]
for device in ("cpu", "cpu-tp2", "fake-static"):
    with open_llm(Case("smollm3", 64, True, False, True, device), folder) as llm:
        for answer, tokens in zip(answers, generate(llm), strict=True):
            verdict = judge(answer, tokens)
            assert verdict.divergence is None or verdict.excused, (device, verdict)
    print("equal on", device)
"""


def test_a_family_is_added_by_following_the_page(tmp_path: Path) -> None:
    """Literally, in a copy of the sources; and in at most 120 lines."""
    page = (ROOT / "docs" / "how-to" / "add-a-model.md").read_text()
    blocks = dict(re.findall(r'```python title="([^"]*)"\n(.*?)```', page, flags=re.DOTALL))
    assert sum(len(text.strip().splitlines()) for text in blocks.values()) <= 120
    sources = {"core/src/anychip": "anychip", "conformance/src/anychip_conformance": "anychip_conformance"}
    for source, name in sources.items():
        shutil.copytree(ROOT / source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for title, text in blocks.items():
        place, _, how = title.partition(": ")
        path = tmp_path / place.split("/src/")[1]
        if not how:
            path.write_text(text)
        elif "NATIVE" in how:
            edit(path, "NATIVE = {\n", text)
        else:
            edit(path, "\n\nFAMILIES:", "", before="\n\n" + text)
            edit(path, "PreTrainedModel]] = {\n", '    "smollm3": _smollm3,\n')
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    said = run(["-c", FOLLOW, str(tmp_path / "checkpoint")], environment)
    assert said.split("\n")[:3] == ["equal on cpu", "equal on cpu-tp2", "equal on fake-static"]


def edit(path: Path, anchor: str, after: str, before: str = "") -> None:
    text = path.read_text()
    assert anchor in text, f"{path} has no {anchor!r}"
    path.write_text(text.replace(anchor, before + anchor + after, 1))
