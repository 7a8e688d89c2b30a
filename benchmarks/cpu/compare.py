"""anychip beside other engines on one machine: the same workloads in turn, the memory's speed probed around each.

python benchmarks/cpu/compare.py CHECKPOINT [--quantization int4] [--workloads abcd] [--repeats 3]
    [--processor-time] [--transformers] [--vllm PYTHON] [--llama-bench PROGRAM MODEL.gguf] [--output FILE.json]

Every engine loads once and stays; while one works the others are stopped (SIGSTOP), so that their waiting threads cost
nothing. One round asks each engine for each workload, in an order that changes from round to round. `ratio` is the
median over rounds of anychip's time over the other's, of the same round; `of_bandwidth` is the share of the probe that
reading the weights of one token takes (dense models alone).

With --processor-time seconds are the processor's, for engines of one process on a machine that others use too; give
both one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import workloads
from probe import bandwidth

from anychip.bench.report import write

HERE = Path(__file__).parent


class Engine:
    """engine.py in a process; `quantization` for anychip alone. `within` is a command that runs the one behind it."""

    def __init__(
        self,
        name: str,
        python: str,
        model: str,
        quantization: str | None = None,
        *,
        speculate: str | None = None,
        within: Sequence[str] = (),
    ) -> None:
        self.name = name
        command = [*within, python, str(HERE / "engine.py"), name, model]
        command += ["--quantization", quantization] if quantization else []
        command += ["--speculate", speculate] if speculate else []
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.ready = self._answer()
        self.ready["seconds"] = time.perf_counter() - began
        self._signal(signal.SIGSTOP)

    def run(self, workload: str, seed: int) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        print(workload, seed, file=self._process.stdin, flush=True)
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self._process.wait()}; run engine.py by hand to see why")
        return dict(json.loads(line))

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()


class Llama:
    """llama.cpp's own benchmark: it starts in a second, so each run is a process. Workloads a and d alone."""

    name = "llama.cpp"

    def __init__(self, program: str, model: str) -> None:
        self.ready: dict[str, Any] = {}
        self._command = [program, "-m", model, "-t", "2", "-fa", "1", "-r", "1", "-o", "json"]

    def run(self, workload: str, seed: int) -> dict[str, Any] | None:
        if workload not in "ad":
            return None
        sizes = ["-p", "0", "-n", "128", "-d", "128"] if workload == "a" else ["-p", "2048", "-n", "0"]
        out = subprocess.run([*self._command, *sizes], check=True, capture_output=True, text=True).stdout
        return {"seconds": json.loads(out)[0]["avg_ns"] / 1e9, "first_s": 0.0}

    def close(self) -> None:
        pass


def figure(workload: str, seed: int, result: dict[str, Any]) -> float:
    """ms a token (a), output tokens a second (b, e, f), seconds (c), prompt tokens a second (d)."""
    asked = workloads.requests(workload, seed)
    if workload == "a":
        written = 127 if result["first_s"] else 128
        return 1e3 * (result["seconds"] - result["first_s"]) / written
    if workload == "c":
        return float(result["seconds"])
    tokens = sum(count for _, count in asked) if workload in "bef" else len(asked[0][0])
    return tokens / float(result["seconds"])


def rate(workload: str, seed: int, result: dict[str, Any]) -> float:
    """Tokens a second: more is faster."""
    value = figure(workload, seed, result)
    return 1e3 / value if workload == "a" else value


UNITS = {"a": "ms/token", "b": "output tok/s", "c": "s", "d": "prompt tok/s", "e": "output tok/s", "f": "output tok/s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--quantization")
    parser.add_argument("--workloads", default="abcd")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--transformers", action="store_true", help="eager, in this environment; workloads a, d, e, f")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--llama-bench", nargs=2, metavar=("PROGRAM", "MODEL"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    engines: list[Engine | Llama] = []
    rounds: list[dict[str, Any]] = []
    try:
        engines.append(Engine("anychip", sys.executable, arguments.checkpoint, arguments.quantization))
        if arguments.transformers:
            engines.append(Engine("transformers", sys.executable, arguments.checkpoint))
        if arguments.vllm:
            engines.append(Engine("vllm", arguments.vllm, arguments.checkpoint))
        if arguments.llama_bench:
            engines.append(Llama(*arguments.llama_bench))
        for engine in engines:
            if isinstance(engine, Engine):
                engine.run(arguments.workloads[0], 9_999)  # first-use costs
        for number in range(arguments.repeats):
            order = engines if number % 2 == 0 else engines[::-1]
            for workload in arguments.workloads:
                for engine in order:
                    before = bandwidth()
                    result = engine.run(workload, number)
                    if result is not None and arguments.processor_time:
                        result |= {"seconds": result["processor_s"], "first_s": result["processor_first_s"]}
                    if result is not None:
                        row = {
                            "engine": engine.name, "workload": workload, "round": number,
                            "value": figure(workload, number, result), "unit": UNITS[workload],
                            "bandwidth_gb_s": [before, bandwidth()], **result,
                        }  # fmt: skip
                        rounds.append(row)
                        print(f"{number} {workload} {engine.name:10} {row['value']:9.2f} {row['unit']}", flush=True)
    finally:
        for engine in engines:
            engine.close()
    report = {
        "checkpoint": Path(arguments.checkpoint).name,
        "quantization": arguments.quantization,
        "seconds_of": "the processor" if arguments.processor_time else "the clock",
        "threads": os.environ.get("OMP_NUM_THREADS") or "all",
        "ready": {engine.name: engine.ready for engine in engines},
        "summary": summary(rounds),
        "rounds": rounds,
    }
    if arguments.output:
        write(arguments.output, report)


def summary(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By workload and engine: the median figure, its spread, and anychip's ratio to it round by round."""
    rows = []
    for workload in sorted({row["workload"] for row in rounds}):
        ours = {r["round"]: r["value"] for r in rounds if r["workload"] == workload and r["engine"] == "anychip"}
        for engine in dict.fromkeys(row["engine"] for row in rounds):
            found = {r["round"]: r for r in rounds if r["workload"] == workload and r["engine"] == engine}
            if not found:
                continue
            values = [row["value"] for row in found.values()]
            ratios = [ours[number] / row["value"] for number, row in found.items()]
            rows.append(
                {
                    "workload": workload,
                    "engine": engine,
                    "unit": UNITS[workload],
                    "median": statistics.median(values),
                    "least": min(values),
                    "most": max(values),
                    "anychip_over_it": statistics.median(ratios),
                    "bandwidth_gb_s": statistics.median(b for row in found.values() for b in row["bandwidth_gb_s"]),
                }
            )
    return rows


if __name__ == "__main__":
    main()
