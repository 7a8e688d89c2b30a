"""Every kind and case of the suite, in the order of their files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from anychip_conformance.case import Case, Kind

CASES = Path(__file__).parent / "cases"


def kinds_of(module: ModuleType) -> list[Kind]:
    return [value for value in vars(module).values() if isinstance(value, Kind)]


@cache
def all_kinds() -> tuple[Kind, ...]:
    found = []
    for path in sorted(CASES.glob("test_*.py")):
        found += kinds_of(import_module(f"anychip_conformance.cases.{path.stem}"))
    return tuple(found)


def all_cases() -> Iterator[Case]:
    for kind in all_kinds():
        yield from kind.cases()


@cache
def _by_id() -> dict[str, Case]:
    return {case.id: case for case in all_cases()}


def find_case(id: str) -> Case | None:
    return _by_id().get(id)
