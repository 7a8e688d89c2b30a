"""How much drafts from a request's own text bring anychip, and how much they bring vLLM, on the same prompts.

python benchmarks/cpu/speculation_peers.py CHECKPOINT [--vllm PYTHON] [--works edit,extract,chat] [--streams 1,8]
    [--repeats 3] [--output FILE.json]

Each engine runs twice, with `ngram` and without drafts: four processes, of which one works and the others are stopped.
Both look three tokens up and draft five at most. A round asks each for the same new prompts, in an order that changes
from round to round. `times_faster` is the median over rounds of an engine's time without drafts over its time with
them, of the same round; `anychip_over_it` the median of anychip's tokens a second with drafts over the other engine's.
CHECKPOINT is a folder with a tokenizer.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import repeating
from compare import Engine

from anychip.bench.report import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--works", default=",".join(repeating.WORKS))
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    pythons = {"anychip": sys.executable} | ({"vllm": arguments.vllm} if arguments.vllm else {})
    workloads = [f"{work}-{count}" for work in arguments.works.split(",") for count in arguments.streams.split(",")]
    engines: dict[tuple[str, str], Engine] = {}
    seconds: dict[tuple[str, str, str], list[float]] = {}
    try:
        for name, python in pythons.items():
            for kind, speculate in (("plain", None), ("ngram", "ngram")):
                engines[name, kind] = Engine(name, python, arguments.checkpoint, speculate=speculate)
                print(f"{name}, {kind}: ready", flush=True)
        for number in range(arguments.repeats + 1):
            for workload in workloads:
                for key, engine in list(engines.items())[:: 1 if number % 2 else -1]:
                    took = engine.run(workload, number)["seconds"]
                    if number:  # the first round warms up
                        seconds.setdefault((workload, *key), []).append(took)
            print(f"round {number}: load {os.getloadavg()[0]:.1f}", flush=True)
    finally:
        for engine in engines.values():
            engine.close()
    rows = [row(workload, name, seconds) for workload in workloads for name in pythons]
    for each in rows:
        print(each)
    if arguments.output:
        load = round(os.getloadavg()[0], 1)
        write(arguments.output, {"checkpoint": Path(arguments.checkpoint).name, "load": load, "rows": rows})


def row(workload: str, name: str, seconds: dict[tuple[str, str, str], list[float]]) -> dict[str, Any]:
    plain, drafting = seconds[workload, name, "plain"], seconds[workload, name, "ngram"]
    ours = seconds[workload, "anychip", "ngram"]
    tokens = int(workload.partition("-")[2]) * repeating.TOKENS
    return {
        "workload": workload,
        "engine": name,
        "times_faster": round(statistics.median(a / b for a, b in zip(plain, drafting, strict=True)), 3),
        "tokens_a_second_plain": round(tokens / statistics.median(plain), 1),
        "tokens_a_second_ngram": round(tokens / statistics.median(drafting), 1),
        "anychip_over_it": round(statistics.median(a / b for a, b in zip(drafting, ours, strict=True)), 3),
    }


if __name__ == "__main__":
    main()
