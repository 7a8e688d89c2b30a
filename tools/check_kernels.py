"""Builds the CPU's kernels in a way that is not shipped, and runs conformance's attention, latent, state, product,
mixture and op sections on them.

python tools/check_kernels.py sanitized [--isa avx2]   AddressSanitizer and UndefinedBehaviorSanitizer
python tools/check_kernels.py emulated-amx             AMX's registers as arrays, for processors that have none

The build goes to a folder of its own that stands before the installed plugin. Of sanitized kernels there is one
variant, this processor's fastest unless another is named; the sanitizers' runtime is preloaded, since Python itself is
built without it. Leaks are not looked for: Python leaks on purpose.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from anychip_conformance.manifest import frozen
from anychip_cpu.native import EMULATED_AMX, usable

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugins/cpu"
SECTIONS = ("attn", "kv", "latent", "linear", "moe", "op", "sample", "state")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", choices=("sanitized", "emulated-amx"))
    parser.add_argument("--isa", default=usable()[0], help="of sanitized kernels")
    arguments = parser.parse_args()
    if arguments.build == "emulated-amx":
        sys.exit(checked(EMULATED_AMX, {"ANYCHIP_VARIANT": EMULATED_AMX}, {}))
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout
    build = {"ANYCHIP_VARIANT": arguments.isa, "ANYCHIP_SANITIZE": "1"}
    preload = {"LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    sys.exit(checked(arguments.isa, build, preload))


def checked(isa: str, build: dict[str, str], run: dict[str, str]) -> int:
    """Conformance's exit code. `build` and `run` are what the environments of the two hold besides ours."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["setup.py", "-q", "build", "--build-base", f"{folder}/work", "--build-lib", f"{folder}/lib"]
        subprocess.run([sys.executable, *command], cwd=PLUGIN, env={**os.environ, **build}, check=True)
        cases = [name for name in frozen().cases if name.split(".")[0] in SECTIONS]
        command = [str(Path(sys.executable).with_name("anychip")), "conformance", "--device", "cpu"]
        command += ["--device-opt", f"isa={isa}", "--deadline-scale", "10"]
        command += [part for case in cases for part in ("--case", case)]
        environment = {**os.environ, **run, "PYTHONPATH": f"{folder}/lib"}
        return subprocess.run([sys.executable, *command], env=environment).returncode


if __name__ == "__main__":
    main()
