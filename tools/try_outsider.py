"""Is a plugin what its author would ship? Builds examples/anychip-acme in an empty environment, from wheels, with no
path into the repository, runs its own tests, judges it, and serves a prompt.

python tools/try_outsider.py dist [--torch torch==2.13.0]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from try_wheels import run

_EXAMPLE = Path(__file__).parents[1] / "examples" / "anychip-acme"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("--torch", default="torch==2.13.0")
    parser.add_argument("--report", type=Path, help="where the scorecard goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "venv" / "bin" / "python"
        run([sys.executable, "-m", "venv", python.parent.parent], folder)
        plugin = Path(folder) / "anychip-acme"
        shutil.copytree(_EXAMPLE, plugin, ignore=shutil.ignore_patterns("__pycache__"))
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--find-links", arguments.wheels.resolve(), arguments.torch, f"{plugin}[test]"], folder)
        where = run(
            [python, "-c", "import anychip, anychip_acme; print(anychip.__file__, anychip_acme.__file__)"], folder
        )
        assert all(place.startswith(folder) for place in where.split()), f"not from the wheels: {where}"
        sys.stdout.write(run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", plugin / "tests"], folder))
        command = python.parent / "anychip"
        report = Path(folder) / "report"
        sys.stdout.write(run([command, "conformance", "--device", "acme", "-n", "2", "--report", report], folder))
        if arguments.report:
            shutil.copytree(report, arguments.report, dirs_exist_ok=True)
        hot_path = run([command, "doctor", "--device", "acme", "--hot-path"], folder)
        assert "rms_norm: acme (anychip_acme.ops.rms_norm)" in hot_path, hot_path
        run([command, "new-plugin", "zeta", "--seam", "step", "--output", folder], folder)
        assert (Path(folder) / "anychip-zeta" / "src" / "anychip_zeta" / "program.py").is_file(), (
            "templates are not shipped"
        )
        prompt = ["--prompt", "import numpy as", "--max-tokens", "4", "--temperature", "0"]
        answer = run([command, "generate", "--device", "acme", *prompt], folder)
    sys.stdout.write(f"acme, from wheels, generated {answer.strip()!r}\n")


if __name__ == "__main__":
    main()
