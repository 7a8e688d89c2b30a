"""What judging costs: wall time of a profile, and the most memory that its processes held together.

python benchmarks/conformance_cost.py --device cpu --profiles quick core full -n 2 --out benchmarks/results/x.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from anychip.bench.report import write

_SAMPLE_S = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profiles", nargs="+", default=["quick", "core"])
    parser.add_argument("-n", dest="workers", nargs="+", default=["0", "2"], help="judged processes side by side")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for profile in arguments.profiles:
        for workers in arguments.workers:
            rows.append(measured(arguments.device, profile, workers))
            print(rows[-1], flush=True)
    if arguments.out:
        write(arguments.out, {"runs": rows})
    return 0


def measured(device: str, profile: str, workers: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "anychip.entrypoints.cli.main", "conformance", "--device", device]
    command += ["--profile", profile, "-n", workers]
    start, peak = time.perf_counter(), 0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        peak = max(peak, proportional_bytes(child.pid))
        time.sleep(_SAMPLE_S)
    seconds = round(time.perf_counter() - start, 1)
    return {"device": device, "profile": profile, "workers": int(workers), "status": child.returncode,
            "seconds": seconds, "peak_bytes": peak}  # fmt: skip


def proportional_bytes(root: int) -> int:
    """Memory of a process and all below it; pages that several map are shared out among them."""
    total = 0
    for pid in [root, *descendants(root)]:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue  # it has ended
    return total


def descendants(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
        except OSError:
            continue
    found, queue = [], [root]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


if __name__ == "__main__":
    sys.exit(main())
