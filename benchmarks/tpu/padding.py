"""How much of a TPU's steps is padding under the chat mix of `anychip bench`, by how much buckets grow.

The scheduler's real steps are recorded on the CPU, with the embedded model: which steps come follows from lengths and
limits, not from the device. Every request is there from the start.

    python benchmarks/tpu/padding.py --output benchmarks/results/tpu/padding.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from anychip import LLM
from anychip.bench.report import write
from anychip.bench.workload import Workload
from anychip.plugin_api import ShapePolicy, StepLimits
from anychip_tpu.shapes import BucketedShapes

GROWTHS = (1.5, 2, 4)
_ROWS, _TOKENS, _LENGTH = 64, 1024, 2048


def recorded(num_prompts: int) -> list[dict[str, Any]]:
    """The sizes of every step, as a shape policy is asked for them."""
    steps: list[dict[str, Any]] = []
    bucket = ShapePolicy.bucket

    def asked(self: ShapePolicy, **sizes: Any) -> Any:
        steps.append(sizes)
        return bucket(self, **sizes)

    work = Workload(num_prompts=num_prompts, input_len=120, output_len=60, mix="chat")
    with (
        patch.object(ShapePolicy, "bucket", asked),
        LLM(device="cpu", max_num_seqs=_ROWS, max_num_batched_tokens=_TOKENS, max_model_len=_LENGTH) as llm,
    ):
        steps.clear()  # those of the start
        prompts, sampling = zip(*work.requests(1000), strict=True)
        llm.generate([list(prompt) for prompt in prompts], list(sampling))
    return steps


def padding(steps: list[dict[str, Any]], growth: float) -> dict[str, float]:
    limits = StepLimits(
        max_num_tokens=_TOKENS, max_num_reqs=_ROWS, max_model_len=_LENGTH, max_slots=_ROWS, max_pages=(_LENGTH // 16,)
    )
    shapes = BucketedShapes(limits, bucket_pages=False, growth=growth)
    kinds = {"steps with prompts": True, "steps of one token a row": False}
    found: dict[str, float] = {"programs": len(shapes.keys())}
    for kind, with_prompts in kinds.items():
        chosen = [step for step in steps if (step["max_query_len"] > 1) == with_prompts]
        padded = sum(shapes.bucket(**step).num_tokens for step in chosen)
        found[kind] = round(1 - sum(step["num_tokens"] for step in chosen) / max(padded, 1), 3)
    padded = sum(shapes.bucket(**step).num_tokens for step in steps)
    return found | {"all": round(1 - sum(step["num_tokens"] for step in steps) / padded, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    steps = recorded(arguments.prompts)
    found = {
        "steps": len(steps),
        "limits": {"rows": _ROWS, "tokens": _TOKENS},
        "share of tokens that is padding, by growth": {str(growth): padding(steps, growth) for growth in GROWTHS},
    }
    print(json.dumps(found, indent=1))
    if arguments.output:
        write(arguments.output, found)


if __name__ == "__main__":
    main()
