"""What following a grammar costs: steps with and without one, interleaved, over the same number of rows and tokens.

python benchmarks/structured.py --output benchmarks/results/serving/structured.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from anychip import LLM, SamplingParams
from anychip.bench.report import write
from anychip.sampling_params import StructuredOutput

GRAMMARS = {
    "schema": StructuredOutput("json_schema", '{"type": "array", "items": {"type": "string"}, "minItems": 400}'),
    "regex": StructuredOutput("regex", "([a-z]{1,9} ){400}"),
}


def step_seconds(llm: LLM, rows: int, tokens: int, wanted: StructuredOutput | None) -> float:
    """Mean over the steps of one batch."""
    prompts = [[3 + (row * 7919 + at) % 8000 for at in range(16)] for row in range(rows)]
    params = SamplingParams(temperature=1, seed=1, max_tokens=tokens, structured=wanted)
    plain = SamplingParams(temperature=1, seed=1, max_tokens=tokens, ignore_eos=True)
    began, steps = time.perf_counter(), llm.engine.scheduler.stats.steps
    llm.generate(prompts, plain if wanted is None else params)
    return (time.perf_counter() - began) / (llm.engine.scheduler.stats.steps - steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = []
    with LLM("quickstart", device="cpu", kv_cache_bytes=2**28) as llm:
        for rows in (1, 8, 64):
            for name, wanted in GRAMMARS.items():
                step_seconds(llm, rows, 8, wanted)  # compiles it
                pairs = [
                    (step_seconds(llm, rows, arguments.tokens, None), step_seconds(llm, rows, arguments.tokens, wanted))
                    for _ in range(arguments.rounds)
                ]
                ratio = statistics.median(b / a for a, b in pairs)
                found.append({"rows": rows, "grammar": name, "ratio": ratio, "pairs": pairs})
                print(f"{rows} rows, {name}: {100 * (ratio - 1):+.1f} % a step")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write(arguments.output, {"benchmark": "structured", "model": "quickstart", "results": found})


if __name__ == "__main__":
    main()
