"""No circle of imports, those for annotations counted: in a circle, a type lives in the wrong file."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import anychip

SOURCE = Path(anychip.__file__).parent
MOST_LINES = 250
"""Of a file that every vendor reads."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("anychip", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, known: Mapping[str, Path]) -> set[str]:
    """Modules of `known` that a file imports anywhere: at the top, under TYPE_CHECKING, in a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & known.keys() or {node.module}
    return names & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(ast.parse(path.read_text()), known) - {name} for name, path in known.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle, from a node back to it; []: there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def test_no_modules_import_each_other_in_a_circle(graph):
    assert circle(graph) == []


def test_no_packages_import_each_other_in_a_circle(graph):
    packages = dict[str, set[str]]()
    for name, names in graph.items():
        if name != "anychip":  # the package itself holds the version, and names that are imported when asked for
            own = packages.setdefault(_package(name), set())
            own |= {_package(other) for other in names if other != "anychip"} - {_package(name)}
    assert {"anychip.plugin_api", "anychip.request", "anychip.kv_cache", "anychip.scheduler"} <= packages.keys()
    assert circle(packages) == []


def _package(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_imports_for_annotations_and_within_functions_count():
    text = "if TYPE_CHECKING:\n    from anychip.a import B\ndef f():\n    from anychip import c\n    import anychip.d\n"
    known = {name: Path() for name in ("anychip", "anychip.a", "anychip.c", "anychip.d")}
    assert imported(ast.parse(text), known) == {"anychip.a", "anychip.c", "anychip.d"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) in (list("abca"), list("bcab"), list("cabc"))


@pytest.mark.parametrize("path", sorted((SOURCE / "plugin_api").glob("*.py")), ids=lambda path: path.name)
def test_a_file_of_the_interface_is_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
