"""Runs the attention, product, mixture and op sections of conformance on the CPU's kernels, built with AddressSanitizer
and UndefinedBehaviorSanitizer.

python tools/sanitize.py [--isa avx2]

One variant, the fastest of this processor unless another is named. The build goes to a folder of its own that stands before the installed plugin; the sanitizers' runtime is preloaded,
since Python itself is built without it. Leaks are not looked for: Python leaks on purpose.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from anychip_conformance.manifest import frozen
from anychip_cpu.native import usable

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugins/cpu"
SECTIONS = ("attn", "kv", "linear", "moe", "op", "sample")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--isa", default=usable()[0])
    isa = parser.parse_args().isa
    python = sys.executable
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ANYCHIP_SANITIZE": isa}
        build = [python, "setup.py", "-q", "build", "--build-base", f"{folder}/work", "--build-lib", f"{folder}/lib"]
        subprocess.run(build, cwd=PLUGIN, env=environment, check=True)
        environment |= {
            "LD_PRELOAD": runtime.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": f"{folder}/lib",
            "PYTHONMALLOC": "malloc",
        }
        cases = [name for name in frozen().cases if name.split(".")[0] in SECTIONS]
        anychip = str(Path(python).with_name("anychip"))
        command = [
            python,
            anychip,
            "conformance",
            "--device",
            "cpu",
            "--device-opt",
            f"isa={isa}",
            "--deadline-scale",
            "10",
        ]
        result = subprocess.run([*command, *(part for case in cases for part in ("--case", case))], env=environment)
    sys.exit(result.returncode)


if __name__ == "__main__":
    main()
