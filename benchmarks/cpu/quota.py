"""anychip in a control group with a quota, beside anychip bound to as many cores as the quota allows.

python benchmarks/cpu/quota.py CHECKPOINT [--cpus 1] [--rounds 5] [--output FILE.json]

Makes a control group below this process's own, of whichever version the system has, and removes it at the end: this
takes root, or a group that was delegated. Both engines load once and take turns; while one works the other is stopped.
The engine in the group finds the quota by itself. Workloads are compare.py's d (prefill) and a (one stream).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare import Engine, rate

from anychip.bench.report import write
from anychip_cpu.limits import allowed_cores, control_groups

WORKLOADS = {"d": "prefill", "a": "decode"}
_PERIOD_US = 100_000


@contextlib.contextmanager
def group(cpus: float) -> Iterator[Path]:
    """A new control group with a quota. Raises SystemExit where none can be made."""
    quota, why = int(cpus * _PERIOD_US), ["no control group has the controller"]
    for parent in control_groups("cpu"):
        folder = parent / f"anychip-quota-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            why.append(str(error))
            continue
        try:
            if (folder / "cpu.max").exists():
                (folder / "cpu.max").write_text(f"{quota} {_PERIOD_US}")
            else:
                (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(str(quota))
        except OSError as error:
            why.append(str(error))
            folder.rmdir()
            continue
        try:
            yield folder
        finally:
            folder.rmdir()
        return
    raise SystemExit(
        f"a quota cannot be set here: {why[-1]}; run this as root, or in a group that was delegated to you"
    )


def throttled(folder: Path) -> int:
    """Periods in which the group was stopped."""
    lines = (line.split() for line in (folder / "cpu.stat").read_text().splitlines())
    return next((int(line[1]) for line in lines if line[0] == "nr_throttled"), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--cpus", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cores = sorted(allowed_cores())[: max(1, int(arguments.cpus))]
    rounds: list[dict[str, Any]] = []
    with group(arguments.cpus) as folder, contextlib.ExitStack() as ending:
        join = ["sh", "-c", f'echo $$ > "{folder}/cgroup.procs" && exec "$@"', "sh"]
        pin = ["taskset", "-c", ",".join(map(str, cores))]
        engines = {}
        for name, within in (("quota", join), ("pinned", pin)):
            engines[name] = Engine("anychip", sys.executable, arguments.checkpoint, within=within)
            ending.callback(engines[name].close)
        for engine in engines.values():
            engine.run("a", 9_999)  # first-use costs
        for number in range(arguments.rounds):
            row: dict[str, Any] = {"round": number, "load": os.getloadavg()[0]}
            for workload, kind in WORKLOADS.items():
                found = {}
                for name in list(engines)[:: 1 if number % 2 == 0 else -1]:
                    before = throttled(folder)
                    found[name] = rate(workload, number, engines[name].run(workload, number))
                    if name == "quota":
                        found["periods_throttled"] = throttled(folder) - before
                row[kind] = {**found, "ratio": found["quota"] / found["pinned"]}
                print(number, kind, " ".join(f"{name} {value:.2f}" for name, value in row[kind].items()), flush=True)
            rounds.append(row)
    summary = {
        kind: {name: statistics.median(row[kind][name] for row in rounds) for name in ("quota", "pinned", "ratio")}
        for kind in WORKLOADS.values()
    }
    for kind, found in summary.items():
        print(f"{kind}: under a quota of {arguments.cpus:g} CPUs {found['ratio']:.2f} of {len(cores)} pinned")
    if arguments.output:
        write(
            arguments.output,
            {
                "checkpoint": Path(arguments.checkpoint).name,
                "cpus": arguments.cpus,
                "cores_pinned": len(cores),
                "command": " ".join(sys.argv),
                "summary": summary,
                "rounds": rounds,
            },
        )


if __name__ == "__main__":
    main()
