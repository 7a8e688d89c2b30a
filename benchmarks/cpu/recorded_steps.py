"""What Python costs a step of one stream, with recorded steps and without.

python benchmarks/cpu/recorded_steps.py MODEL... [--output JSON] [--rounds N] [--tokens N] [--threads N]

Both ways run in turn in one process. Their processor time, of all threads, is compared round by round, so that a busy
machine disturbs both. Then each way runs once more with every compiled call timed. `between` is the share of a step
that lies between its first compiled call and its last one and in none; `outside` is all of it that lies in no compiled
call, the engine's part among it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from anychip import LLM, SamplingParams
from anychip_cpu import native

PROMPT_TOKENS = 100


def opened(model: str, graphs: bool, threads: int) -> LLM:
    return LLM(
        model, device="cpu", max_num_seqs=4, max_model_len=1024, skip_tokenizer=True,
        device_options={"graphs": str(graphs), "threads": str(threads)},
    )  # fmt: skip


def generate(llm: LLM, tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    llm.generate([[3 + i % 500 for i in range(PROMPT_TOKENS)]], params)


class Traced:
    """Compiled kernels, and when each of their calls began and ended, by the calling thread's processor time."""

    def __init__(self, kernels: Any) -> None:
        self.__name__ = kernels.__name__
        self.calls: list[tuple[float, float]] = []
        for name in dir(kernels):
            if not name.startswith("__"):
                setattr(self, name, self._timed(getattr(kernels, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.thread_time()
            result = function(*args)
            self.calls.append((began, time.thread_time()))
            return result

        return call


def shares(model: str, graphs: bool, tokens: int, threads: int) -> dict[str, float]:
    """Of the steps that draw a token, medians."""
    load, traced = native.load, list[Traced]()

    def loaded(isa: str) -> Any:
        traced.append(Traced(load(isa)))
        return traced[-1]

    native.load = loaded
    try:
        llm = opened(model, graphs, threads)
    finally:
        native.load = load
    with llm:
        for _ in range(2):  # the second starts from a full prefix cache, and its shapes are recorded too
            generate(llm, 8)
        worker, kernels, begins = llm.engine.executor.worker, traced[0], list[tuple[float, int]]()
        launch = worker.launch

        def noted(decision: Any) -> None:
            begins.append((time.thread_time(), len(kernels.calls)))
            launch(decision)

        worker.launch = noted
        generate(llm, tokens)
    between, outside, counts = [], [], []
    for (began, first), (ended, last) in pairwise(begins[1:]):
        calls = kernels.calls[first:last]
        within = sum(end - begin for begin, end in calls)
        between.append((calls[-1][1] - calls[0][0] - within) / (ended - began))
        outside.append(1 - within / (ended - began))
        counts.append(len(calls))
    return {
        "between": statistics.median(between),
        "outside": statistics.median(outside),
        "compiled_calls": statistics.median(counts),
    }


def times(model: str, rounds: int, tokens: int, threads: int) -> dict[str, Any]:
    """Processor time of a token in milliseconds, and the ratio of both ways round by round."""
    found: dict[bool, list[float]] = {True: [], False: []}
    with opened(model, True, threads) as recorded, opened(model, False, threads) as eager:
        ways = {True: recorded, False: eager}
        for number in range(-2, rounds):
            for graphs in (True, False) if number % 2 else (False, True):
                began = time.process_time()
                generate(ways[graphs], tokens if number >= 0 else 8)
                if number >= 0:
                    found[graphs].append(1000 * (time.process_time() - began) / tokens)
    ratios = [mine / other for mine, other in zip(found[True], found[False], strict=True)]
    return {
        "recorded_ms": statistics.median(found[True]),
        "eager_ms": statistics.median(found[False]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python benchmarks/cpu/recorded_steps.py "
        + " ".join([*(Path(model).name for model in arguments.models), f"--threads {arguments.threads}"]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "kernels": native.version(),
        "load_average": os.getloadavg()[0],
        "models": {},
    }
    for model in arguments.models:
        row = times(model, arguments.rounds, arguments.tokens, arguments.threads)
        row["recorded"] = shares(model, True, arguments.tokens, arguments.threads)
        row["eager"] = shares(model, False, arguments.tokens, arguments.threads)
        report["models"][Path(model).name] = row
        print(Path(model).name, json.dumps(row), file=sys.stderr)
    text = json.dumps(report, indent=1)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
