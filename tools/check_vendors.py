"""What CI runs of the plugins whose vendor's runtime needs an environment of its own: their tests, within minutes.

A plugin is skipped, by name, where its vendor's wheel cannot be had: such wheels are built for few versions of Python,
and not for every host.

    python tools/check_vendors.py [NAME ...] [--minutes 15]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_WHEELS = {"tpu": "torch_xla==2.9.0", "ascend": "torch_npu==2.13.0"}
"""By plugin. `make NAME-venv` and `make NAME-test` are the rest."""


def missing(wheel: str) -> str | None:
    """None where pip finds the wheel, else its words."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    asked = subprocess.run([*command, "--no-deps", "--dry-run", wheel], capture_output=True, text=True)
    return None if asked.returncode == 0 else asked.stderr.strip().splitlines()[-1]


def check(name: str, minutes: float) -> bool:
    if problem := missing(_WHEELS[name]):
        print(f"skipped: tests of anychip-{name} on its vendor's runtime: {_WHEELS[name]} cannot be had: {problem}")
        return True
    make = ["make", f"PYTHON={sys.executable}"]
    subprocess.run([*make, f"{name}-venv"], cwd=_ROOT, check=True)
    try:
        return subprocess.run([*make, f"{name}-test"], cwd=_ROOT, timeout=minutes * 60).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the tests of anychip-{name} took more than {minutes:g} minutes")
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(_WHEELS)}; none: all of them")
    parser.add_argument("--minutes", type=float, default=15, help="for each plugin's tests")
    arguments = parser.parse_args()
    if unknown := {*arguments.names} - {*_WHEELS}:
        parser.error(f"no such plugin: {', '.join(sorted(unknown))}; there are {', '.join(_WHEELS)}")
    names = arguments.names or list(_WHEELS)
    passed = [check(name, arguments.minutes) for name in names]  # one that failed hides no other
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
