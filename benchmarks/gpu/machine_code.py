"""What the Triton kernels use on every target, read from the machine code that a compiler makes without a device.

python benchmarks/gpu/machine_code.py [--targets sm_90 gfx942] [--output FILE.json]

Prints a row of Markdown by target and kernel: how many forms there are, the most registers, spills and shared memory of
any, and which matrix instructions they have.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import triton

from anychip.bench.report import write
from anychip_triton.ahead import MachineCode, all_launches, compile_launch
from anychip_triton.targets import TARGETS


def row(target: str, kernel: str, codes: list[MachineCode]) -> dict[str, Any]:
    return {
        "target": target,
        "kernel": kernel,
        "forms": len(codes),
        "shared_bytes": max(code.shared_bytes for code in codes),
        "registers": max(code.registers for code in codes),
        "spills": max(code.spills for code in codes),
        "matrix_instructions": sorted({name for code in codes for name in code.matrix_instructions}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| target | kernel | forms | shared memory, KiB | vector registers | spills | matrix instructions |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.targets:
        target, found = TARGETS[name], defaultdict(list)
        for launch in all_launches(target):
            found[launch.kernel.__name__].append(compile_launch(launch, target))
        for kernel, codes in found.items():
            made = row(name, kernel, codes)
            rows.append(made)
            numbers = [str(made[key]) for key in ("registers", "spills")]
            instructions = ", ".join(f"`{name}`" for name in made["matrix_instructions"]) or "-"
            shared = f"{made['shared_bytes'] / 1024:.0f} of {target.shared_bytes / 1024:.0f}"
            print("|", " | ".join([name, kernel, str(len(codes)), shared, *numbers, instructions]), "|", flush=True)
    if arguments.output:
        write(arguments.output, {"what": __doc__.partition("\n")[0], "triton": triton.__version__, "rows": rows})


if __name__ == "__main__":
    main()
