"""anychip beside llama.cpp on one GGUF file: what they make of it, how fast, how soon, and in how much memory.

python benchmarks/cpu/gguf.py MODEL.gguf --llama-cpp FOLDER [--tiny tiny.gguf] [--sections agree,speed,memory]
    [--threads 2] [--rounds 5] [--tokens 64] [--output FILE.json]

FOLDER has the package `llama_cpp` (`pip install --target FOLDER llama-cpp-python`); it is not part of anychip. Both
engines load once, each in a process, and take turns: a ratio is the median over rounds of anychip's figure over
llama.cpp's of the same round. gguf_models.py writes files of random blocks, and the tiny one above which memory is
counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from anychip.bench.report import write

HERE = Path(__file__).parent
TEXTS = (
    "The capital of France is", "Water boils at", "The largest planet of the solar system is",
    "Once upon a time there was",
    "A recipe for bread needs", "The first president of the United States was", "In physics, energy is",
    "To open a file in Python, one writes", "The opposite of hot is", "Photosynthesis is the process by which",
)  # fmt: skip
NEAR = 0.2
"""Nats of lead under which two tokens are a tie: llama.cpp rounds activations to eight bits."""


class Engine:
    def __init__(
        self, name: str, model: str, arguments: argparse.Namespace, *, dtype: str = "bfloat16", tokens: int = 2560
    ) -> None:
        path = os.pathsep.join(
            filter(None, (os.environ.get("PYTHONPATH"), arguments.llama_cpp if name == "llama" else ""))
        )
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "gguf_engine.py"), name, model, str(arguments.threads), dtype, str(tokens)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(arguments.threads)},
        )  # fmt: skip
        self.started = self._answer()

    def ask(self, *asked: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended with code {self._process.wait()}; run gguf_engine.py by hand to see why")
        return dict(json.loads(line))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def agreement(engines: dict[str, Engine], exact: Engine, count: int) -> dict[str, Any]:
    """Log-probabilities of 500 tokens, and greedy texts of 50 prompts. `exact`: anychip in float32."""

    def encode(text: str) -> list[int]:
        return list(engines["llama"].ask("encode", text)["result"])

    prompts = [encode(f"{text}{end}") for text in TEXTS for end in ("", " a", " the", ":", " not")]
    sample = encode(" ".join(Path(__file__).read_text().split()))[:501]
    scores = {name: engine.ask("score", sample)["result"] for name, engine in (*engines.items(), ("exact", exact))}

    def differ(first: str, second: str) -> dict[str, float]:
        gaps = [abs(a - b) for a, b in zip(scores[first], scores[second], strict=True)]
        return {"mean": statistics.fmean(gaps), "greatest": max(gaps), "of_means": abs(
            statistics.fmean(scores[first]) - statistics.fmean(scores[second]))}  # fmt: skip

    verdicts: list[str] = []
    leads: list[float] = []
    for prompt in prompts:
        ours, theirs = (engines[name].ask("write", prompt, count)["result"] for name in ("anychip", "llama"))
        verdicts.append(compared(ours, theirs))
        leads += [min(a["lead"], b["lead"]) for a, b in zip(ours, theirs, strict=True) if a["token"] != b["token"]][:1]
    return {
        "tokens_scored": len(sample) - 1,
        "logprob_differences": {
            "anychip, llama.cpp": differ("anychip", "llama"), "anychip, float32": differ("anychip", "exact"),
            "llama.cpp, float32": differ("llama", "exact"),
        },
        "greedy": {
            "prompts": len(prompts), "tokens": count, "leads_where_they_part": sorted(leads),
            **{v: verdicts.count(v) for v in sorted(set(verdicts))},
        },
    }  # fmt: skip


def compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    for a, b in zip(ours, theirs, strict=True):
        if a["token"] != b["token"]:
            # Not by who is second: bfloat16 has ties of three.
            return "equal to a near tie" if min(a["lead"], b["lead"]) < NEAR else "different"
    return "equal"


def speed(engines: dict[str, Engine], arguments: argparse.Namespace) -> dict[str, Any]:
    """One stream's time a token, after 16, and the rate at which a prompt of 512 is taken."""
    rng, rows = random.Random(3), []
    for number in range(arguments.rounds):
        short, long = ([rng.randrange(3, 30000) for _ in range(count)] for count in (16, 512))
        row: dict[str, dict[str, float]] = {}
        for name in sorted(engines, reverse=number % 2 == 1):
            first, all_, prompt = (
                engines[name].ask("run", *asked) for asked in ((short, 1), (short, arguments.tokens + 1), (long, 1))
            )
            row[name] = {
                f"{what}{kind}": value
                for kind, field in (("", "seconds"), ("_processor", "processor_s"))
                for what, value in (
                    ("ms_a_token", 1e3 * (all_[field] - first[field]) / arguments.tokens),
                    ("prompt_tokens_a_second", 512 / prompt[field]),
                )
            }
        rows.append(row)
        print(number, {name: {k: round(v, 1) for k, v in each.items()} for name, each in row.items()}, flush=True)
    fields = rows[0]["llama"]
    ratios = {f: median_ratio([r["anychip"][f] for r in rows], [r["llama"][f] for r in rows]) for f in fields}
    return {"anychip_over_llama": ratios, "rounds": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llama-cpp", required=True, metavar="FOLDER")
    parser.add_argument("--tiny", metavar="FILE")
    parser.add_argument("--sections", default="agree,speed,memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--note", default="", help="what the figures' reader must know, such as a machine that is shared"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sections = arguments.sections.split(",")
    report: dict[str, Any] = {"model": Path(arguments.model).name, "file_bytes": Path(arguments.model).stat().st_size}
    report |= {"threads": arguments.threads, "note": arguments.note}
    engines: dict[str, Engine] = {}
    try:
        if "memory" in sections:
            report["memory"] = memory(arguments)
            print(report["memory"], flush=True)
        if {"agree", "speed"} & set(sections):
            engines = {name: Engine(name, arguments.model, arguments) for name in ("anychip", "llama")}
            report["start"] = {
                name: {k: v for k, v in e.started.items() if k != "result"} for name, e in engines.items()
            }
        if "agree" in sections:
            exact = Engine("anychip", arguments.model, arguments, dtype="float32")
            report["agreement"] = agreement(engines, exact, 32)
            exact.close()
            print(report["agreement"], flush=True)
        if "speed" in sections:
            report["speed"] = speed(engines, arguments)
            print(report["speed"]["anychip_over_llama"], flush=True)
    finally:
        for engine in engines.values():
            engine.close()
    if arguments.output:
        write(arguments.output, report)


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes that a process with the model holds above one with next to none, either with a KV cache of three blocks."""
    held = {}
    for name, model in (("model", arguments.model), ("tiny", arguments.tiny)):
        engine = Engine("anychip", model, arguments, tokens=16)
        held[name] = engine.started["resident"]
        engine.close()
    above = held["model"] - held["tiny"]
    return {"above_tiny": above, "over_file": above / Path(arguments.model).stat().st_size, **held}


if __name__ == "__main__":
    main()
