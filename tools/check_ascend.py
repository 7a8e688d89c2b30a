"""What CI runs of the ascend plugin: its tests over the NPU simulator, within minutes and in an environment of its own.

Skipped, by name, where the vendor's wheel cannot be had: it is built for few versions of Python, and not for every
host.

python tools/check_ascend.py .venv-ascend [--minutes 5]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_WHEEL = "torch_npu==2.13.0"
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def wheel_is_there(python: Path) -> str | None:
    """None where pip finds the wheel, else its words."""
    asked = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--dry-run", _WHEEL],
        capture_output=True, text=True,
    )  # fmt: skip
    return None if asked.returncode == 0 else asked.stderr.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    arguments = parser.parse_args()
    if missing := wheel_is_there(Path(sys.executable)):
        sys.stdout.write(f"skipped: the ascend plugin over its simulator: {_WHEEL} cannot be had: {missing}\n")
        return 0
    subprocess.run(["make", "ascend-venv", f"PYTHON={sys.executable}"], cwd=_ROOT, check=True)
    tests = [arguments.venv / "bin" / "python", "-m", "pytest", "-q", "-n", "auto", "-m", "not full", "plugins/ascend"]
    try:
        done = subprocess.run(tests, cwd=_ROOT, env={**os.environ, **_ENVIRONMENT}, timeout=arguments.minutes * 60)
    except subprocess.TimeoutExpired:
        sys.stdout.write(f"the ascend plugin's tests took more than {arguments.minutes:g} minutes\n")
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
