"""anychip on a GPU, and vLLM beside it where it is installed: the same workloads, one engine after the other.

python benchmarks/gpu/compare.py --shapes qwen-0.5b llama-8b qwen-30b-a3b [--vllm PYTHON] [--device cuda] [--output F]

Random weights, no tokenizer, greedy, every request as long as asked. The order of the engines changes from shape to
shape. `ratio` is anychip's figure over vLLM's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import workloads

from anychip.bench.report import write

ENGINE = Path(__file__).parent / "engine.py"


def engine_command(
    engine: str, python: str, shape: str, folder: str, named: Sequence[str], arguments: argparse.Namespace
) -> list[str]:
    """engine.py for a shape and the workloads `named`, with the program's own options."""
    command = [python, str(ENGINE), engine, shape, "--folder", folder, "--device", arguments.device]
    command += ["--scale", str(arguments.scale), "--repeats", str(arguments.repeats), "--workloads", *named]
    return command + [f"--device-opt={option}" for option in arguments.device_opt]


def run(engine: str, python: str, shape: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What engine.py prints. What it says besides goes to this program's stderr."""
    with tempfile.TemporaryDirectory() as folder:
        command = engine_command(engine, python, shape, folder, arguments.workloads, arguments)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{engine} on {shape} ended with status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def figure(result: dict[str, Any], vocab_size: int, scale: float) -> tuple[float, str]:
    """The median over repetitions: seconds to start, ms a token or step, or tokens a second."""
    workload, seconds = result["workload"], statistics.median(result["seconds"])
    if workload == "start":
        return seconds, "s"
    asked = workloads.requests(workload, vocab_size, 0, scale)
    if result["first_s"]:
        return 1e3 * (seconds - statistics.median(result["first_s"])) / (asked[0][1] - 1), "ms/step"
    if workload == "prefill":
        return sum(len(prompt) for prompt, _ in asked) / seconds, "prompt tok/s"
    return sum(count for _, count in asked) / seconds, "output tok/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name in workloads.SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=workloads.SHAPES)
    parser.add_argument("--workloads", nargs="+", default=workloads.WORKLOADS, choices=workloads.WORKLOADS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-opt", action="append", default=[], metavar="NAME=VALUE", help="of anychip's device")
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of an environment that has vLLM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks every length, to try the benchmark itself")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    engines = [("anychip", sys.executable)] + ([("vllm", arguments.vllm)] if arguments.vllm else [])
    rows: list[dict[str, Any]] = []
    for number, shape in enumerate(arguments.shapes):
        vocab = workloads.SHAPES[shape]["vocab_size"]
        for engine, python in engines if number % 2 == 0 else engines[::-1]:
            for result in run(engine, python, shape, arguments):
                value, unit = figure(result, vocab, arguments.scale)
                rows.append({"shape": shape, "engine": engine, "value": value, "unit": unit, **result})
                print(f"{shape:14} {engine:8} {result['workload']:10} {value:12.2f} {unit}", flush=True)
    for row in [row for row in rows if row["engine"] == "anychip"]:
        same = [r for r in rows if (r["shape"], r["workload"]) == (row["shape"], row["workload"]) and r is not row]
        if same:
            row["ratio"] = row["value"] / same[0]["value"]
            print(f"{row['shape']:14} {row['workload']:10} anychip / vllm = {row['ratio']:.2f} ({row['unit']})")
    if arguments.output:
        settings = {
            "device": arguments.device,
            "device_options": arguments.device_opt,
            "scale": arguments.scale,
            "repeats": arguments.repeats,
        }
        write(arguments.output, {"what": __doc__.partition("\n")[0], **settings, "rows": rows})


if __name__ == "__main__":
    main()
