"""What must not reach what: torch in the API process, vendor words in core's conditions, variables outside config."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import anychip

SOURCE = Path(anychip.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
VENDOR_WORDS = {"cuda", "rocm", "hip", "tpu", "xla", "ascend", "npu", "nvidia", "amd", "gaudi", "hpu", "xpu", "cpu"}
# "cpu" is also torch's name of host memory; in a condition it would be a vendor's name like the others.


@pytest.mark.parametrize(
    "module",
    [
        "anychip.plugin_api",
        "anychip.entrypoints.http.server",
        "anychip.entrypoints.cli.main",
        "anychip.launch.async_llm",
        "anychip.launch.build",
        "anychip.engine.engine_loop",
        "anychip.executor.multiprocess",
        "anychip.scheduler.scheduler",
    ],
)
def test_importing_does_not_load_torch(module):
    program = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_condition_holds_a_vendor_word(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            found += _vendor_words(node.test)
        elif isinstance(node, ast.comprehension):
            found += [word for condition in node.ifs for word in _vendor_words(condition)]
        elif isinstance(node, ast.Match):
            found += [word for case in node.cases for word in _vendor_words(case.pattern)]
    assert not found, f"ask a capability instead of {found}"


def _vendor_words(node: ast.AST) -> list[str]:
    words: list[str] = []
    for part in ast.walk(node):
        names = []
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            names = part.value.lower().replace(":", "_").split("_")
        elif isinstance(part, ast.Name):
            names = part.id.lower().split("_")
        elif isinstance(part, ast.Attribute):
            names = part.attr.lower().split("_")
        words += [name for name in names if name in VENDOR_WORDS]
    return words


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_environment_is_read_in_one_module_alone(path):
    if path.name == "environment.py" and path.parent == SOURCE:
        return
    text = path.read_text()
    assert "os.environ" not in text
    assert "getenv" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_vendor_namespace_of_torch_is_used(path):
    for word in ("cuda", "xpu", "npu", "hip", "mps"):
        assert f"torch.{word}" not in path.read_text()
