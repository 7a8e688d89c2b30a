"""Checks what a manifest requires: packages by version range, drivers and toolkits by the plugin's own probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from anychip.plugin_api.manifest import Requirement


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequirement:
    """`found` is a version, "present" or None; `met` False with `optional` is a warning."""

    requirement: Requirement
    found: str | None
    met: bool

    def describe(self) -> str:
        r = self.requirement
        wanted = f"{r.name} {r.range}".strip()
        state = f"found {self.found}" if self.found else "not found"
        return f"{wanted}: {state}" + (f"; {r.remedy}" if not self.met and r.remedy else "")


def check_requirements(requirements: Sequence[Requirement]) -> list[CheckedRequirement]:
    """One result per requirement; never raises."""
    return [_check(requirement) for requirement in requirements]


def _check(requirement: Requirement) -> CheckedRequirement:
    found = _find(requirement)
    met = found is not None
    if found is not None and requirement.range:
        try:
            met = SpecifierSet(requirement.range).contains(found, prereleases=True)
        except InvalidVersion:
            met = False
    return CheckedRequirement(requirement=requirement, found=found, met=met)


def _find(requirement: Requirement) -> str | None:
    if requirement.probe:
        module, _, name = requirement.probe.partition(":")
        try:
            found: str | None = getattr(import_module(module), name)()
        except Exception:  # noqa: BLE001 - a stranger's probe may raise anything; that means not found
            return None
        return found
    try:
        return version(requirement.name)
    except PackageNotFoundError:
        return None
