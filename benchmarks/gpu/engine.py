"""One engine in a process of its own: starts it, runs every workload, prints one JSON line for each.

python benchmarks/gpu/engine.py anychip|vllm SHAPE --folder DIR [--device cuda] [--scale 1] [--workloads single batch]

Needs nothing of the repository but workloads.py, so that it runs in another engine's environment too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
Generate = Callable[[list], None]


def anychip_engine(model: str, device: str, options: dict[str, str]) -> Generate:
    from anychip import LLM, SamplingParams

    llm = LLM(
        model, device=device, load_format="dummy", skip_tokenizer=True, max_model_len=16384, device_options=options
    )

    def generate(requests: list) -> None:
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in requests]
        llm.generate([prompt for prompt, _ in requests], params)

    return generate


def vllm_engine(model: str, device: str, options: dict[str, str]) -> Generate:
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, max_model_len=16384,
        enable_prefix_caching=True,
    )  # fmt: skip

    def generate(requests: list) -> None:
        params = [
            SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in requests
        ]
        llm.generate([{"prompt_token_ids": prompt} for prompt, _ in requests], params, use_tqdm=False)

    return generate


def timed(generate: Generate, requests: list) -> float:
    began = time.perf_counter()
    generate(requests)
    return time.perf_counter() - began


def measure(generate: Generate, workload: str, vocab_size: int, scale: float, repeats: int) -> dict[str, Any]:
    """Seconds of each repetition. Every one has prompts of its own, which no cache has seen; those of `prefix` share
    what an earlier request has put there."""
    import workloads

    whole, first = [], []
    for repeat in range(repeats):
        asked = workloads.requests(workload, vocab_size, 2 * repeat, scale)
        if workload == "prefix":
            generate(workloads.only_first(asked[:1]))
        whole.append(timed(generate, asked))
        if workload.startswith(("single", "step")):
            others = workloads.requests(workload, vocab_size, 2 * repeat + 1, scale)
            first.append(timed(generate, workloads.only_first(others)))
    return {"seconds": whole, "first_s": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("anychip", "vllm"))
    parser.add_argument("shape")
    parser.add_argument("--folder", type=Path, required=True, help="where the shape's config.json is written")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-opt", action="append", default=[], metavar="NAME=VALUE", help="of anychip's device")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", nargs="+")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import workloads

    # An engine must not find our files under the names of packages that it looks for.
    sys.path.remove(str(Path(__file__).parent))
    checkpoint = str(workloads.write_checkpoint(arguments.shape, arguments.folder))
    options = dict(option.split("=", 1) for option in arguments.device_opt)
    start = anychip_engine if arguments.engine == "anychip" else vllm_engine
    generate = start(checkpoint, arguments.device, options)

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer({"workload": "start", "seconds": [time.perf_counter() - BEGAN]})
    vocab = workloads.SHAPES[arguments.shape]["vocab_size"]
    for workload in arguments.workloads or workloads.WORKLOADS:
        generate(workloads.requests(workload, vocab, 999_999, arguments.scale))  # first-use costs
        answer({"workload": workload, **measure(generate, workload, vocab, arguments.scale, arguments.repeats)})


if __name__ == "__main__":
    main()
