"""Whether jax and libtpu are there, in versions that belong together."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata

from packaging.specifiers import SpecifierSet

_REMEDY = "pip install 'jax[tpu]'"


def missing(
    version: Callable[[str], str] = metadata.version, requires: Callable[[str], list[str] | None] = metadata.requires
) -> str:
    """What keeps programs from being compiled for TPUs here, with its remedy; empty where nothing does."""
    try:
        jax = version("jax")
    except metadata.PackageNotFoundError:
        return f"jax is not installed, whose compiler for TPUs is asked; {_REMEDY}"
    try:
        found = version("libtpu")
    except metadata.PackageNotFoundError:
        return f"libtpu is not installed, which compiles for TPUs; {_REMEDY}"
    # What a newer jax writes, an older libtpu cannot read: some kernels would fail, with errors that say nothing.
    wanted = wanted_libtpu(requires("jax") or [])
    if wanted is not None and not _at_least(found, wanted):
        return f"libtpu {found} is older than jax {jax} wants: {wanted}; pip install 'libtpu{wanted}'"
    return ""


def wanted_libtpu(requirements: list[str]) -> SpecifierSet | None:
    """Of jax's own requirements for TPUs."""
    for line in requirements:
        if match := re.match(r"libtpu\s*\(?([=<>!~][^;)]*)\)?\s*;.*extra == ['\"]tpu['\"]", line):
            return SpecifierSet(match[1].strip())
    return None


def _at_least(found: str, wanted: SpecifierSet) -> bool:
    """A newer libtpu reads what an older jax writes."""
    return wanted.contains(found) or all(_key(found) > _key(each.version.rstrip(".*")) for each in wanted)


def _key(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
