"""The frozen list of cases: tier A's parameters, tier B's ids, and one hash over all. A run that misses one of its
profile's cases does not conform.

python -m anychip_conformance.manifest writes manifest.json after cases were added. Within an interface version, once
that is 1.0, cases are only added.
"""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from anychip.plugin_api import API_VERSION
from anychip_conformance.case import Case
from anychip_conformance.registry import all_cases

PATH = Path(__file__).parent / "manifest.json"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """`params` None: drawn."""

    profile: str
    quick: bool
    params: Any


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    interface: str
    sha256: str
    cases: dict[str, Entry]

    def expected(self, profile: str) -> list[str]:
        """Ids that a run of a profile must have verdicts of."""
        return [id for id, entry in self.cases.items() if selected(profile, entry.profile, entry.quick)]


def selected(profile: str, of_case: str, quick: bool) -> bool:
    """Whether "quick", "core" or "full" runs a case."""
    if profile == "full":
        return True
    return of_case == "core" and (profile == "core" or quick)


def entry(case: Case) -> Entry:
    return Entry(profile=case.kind.profile, quick=case.quick, params=msgspec.to_builtins(case.params))


def collected() -> Manifest:
    """What the installed files hold."""
    cases = {case.id: entry(case) for case in all_cases()}
    return Manifest(interface=API_VERSION, sha256=digest(cases), cases=cases)


def digest(cases: dict[str, Entry]) -> str:
    return hashlib.sha256(msgspec.json.encode(cases, order="deterministic")).hexdigest()


@cache
def frozen() -> Manifest:
    """What manifest.json says. A file that was changed by hand does not match its hash."""
    manifest = msgspec.json.decode(PATH.read_bytes(), type=Manifest)
    assert digest(manifest.cases) == manifest.sha256, f"{PATH} was edited: write it with python -m {__name__}"
    return manifest


def differences() -> list[str]:
    """Cases that the files and manifest.json do not share, or whose parameters differ."""
    now, then = collected().cases, frozen().cases
    found = [f"{id} is in the manifest and in no file" for id in then if id not in now]
    found += [f"{id} is in a file and not in the manifest" for id in now if id not in then]
    found += [f"{id} has changed" for id in now if id in then and digest({id: now[id]}) != digest({id: then[id]})]
    return found


def main() -> int:
    manifest = collected()
    PATH.write_bytes(msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n")
    sys.stdout.write(f"{len(manifest.cases)} cases, sha256 {manifest.sha256}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
