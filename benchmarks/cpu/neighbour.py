"""The share of its speed that an engine keeps beside a busy process for every two cores.

python benchmarks/cpu/neighbour.py CHECKPOINT [--vllm PYTHON] [--busy 1] [--rounds 5] [--output FILE.json]

Workloads are compare.py's: d is prefill (2,048 tokens in, 1 out), a is one stream (128 in, 128 out). Each round runs
both alone and beside the busy processes, in an order that changes from round to round. A share is of one round, and
the median over the rounds counts. On a machine that others use "alone" is not alone: `load` says how busy it was.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare import Engine, rate

from anychip.bench.report import write
from anychip_cpu.limits import allowed_cores

WORKLOADS = {"d": "prefill", "a": "decode"}


def busy_processes(count: int) -> list[subprocess.Popen[bytes]]:
    """Each keeps a core busy, and says when it has begun."""
    program = "print(end='.', flush=True)\nwhile True: pass"
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(count)]
    for process in started:
        assert process.stdout is not None
        process.stdout.read(1)
    return started


def measure(engine: Engine, number: int, busy: int) -> dict[str, Any]:
    """One engine's round: tokens a second of each workload, alone and beside."""
    row: dict[str, Any] = {"engine": engine.name, "round": number, "load": os.getloadavg()[0]}
    for beside in (False, True) if number % 2 == 0 else (True, False):
        neighbours = busy_processes(busy) if beside else []
        try:
            for workload, name in WORKLOADS.items():
                # Another prompt each time: one that was seen would be found in the cache.
                seed = 2 * number + beside
                row.setdefault(name, {})["beside" if beside else "alone"] = rate(
                    workload, seed, engine.run(workload, seed)
                )
        finally:
            for process in neighbours:
                process.kill()
                process.wait()
    for name in WORKLOADS.values():
        row[name]["share"] = row[name]["beside"] / row[name]["alone"]
        print(
            f"{number} {engine.name:8} {name:8} alone {row[name]['alone']:8.1f} tok/s, share {row[name]['share']:.2f}"
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--busy", type=int, default=max(1, len(allowed_cores()) // 2), help="busy processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    engines: list[Engine] = []
    rounds: list[dict[str, Any]] = []
    try:
        engines.append(Engine("anychip", sys.executable, arguments.checkpoint))
        if arguments.vllm:
            engines.append(Engine("vllm", arguments.vllm, arguments.checkpoint))
        for engine in engines:
            engine.run("a", 9_999)  # first-use costs
        for number in range(arguments.rounds):
            rounds += [measure(engine, number, arguments.busy) for engine in engines]
    finally:
        for engine in engines:
            engine.close()
    summary = {
        engine.name: {
            name: {
                kind: statistics.median(row[name][kind] for row in rounds if row["engine"] == engine.name)
                for kind in ("alone", "beside", "share")
            }
            for name in WORKLOADS.values()
        }
        for engine in engines
    }
    for engine, found in summary.items():
        print(f"{engine} keeps {found['prefill']['share']:.2f} of prefill and {found['decode']['share']:.2f} of decode")
    if arguments.output:
        write(
            arguments.output,
            {
                "checkpoint": Path(arguments.checkpoint).name,
                "busy": arguments.busy,
                "command": " ".join(sys.argv),
                "summary": summary,
                "rounds": rounds,
            },
        )


if __name__ == "__main__":
    main()
