"""What a second stage brings: tokens a second of two processes that hold half of the layers each, beside one process
that holds all of them, every process on one core.

The model has random weights, and its layers are nearly all of it. Both engines are open at once and take turns, so that
what disturbs the machine disturbs both; the ratio of a turn is what counts. The machine needs two quiet cores. Beside
it stands what processor time allows, which a busy machine hardly changes: that of the one process over that of the
busier stage. Requests take turns, so a step over two stages has half of them: with few, a step is bound by reading
weights and not by rows, and the second stage brings less.

    python benchmarks/pipeline.py [--requests 64] [--turns 7] [--output benchmarks/results/cpu/pipeline.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from anychip import LLM, SamplingParams
from anychip.bench.report import write

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 2048,
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
PROMPT, TOKENS = 16, 48
TARGET = 1.6


def opened(folder: str, num_stages: int) -> LLM:
    return LLM(
        folder,
        device="cpu",
        device_options={"threads": "1"},
        executor="multiprocess",
        pipeline_parallel_size=num_stages,
        load_format="dummy",
        skip_tokenizer=True,
        max_model_len=256,
        max_num_seqs=128,
        kv_cache_bytes=512 << 20,
        prefix_caching=False,
    )


def processor_s(llm: LLM) -> list[float]:
    """Processor time that each worker has taken so far."""
    children = llm.engine.executor._children  # type: ignore[attr-defined]
    stats = [Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split() for child in children]
    return [(int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") for stat in stats]


def run(llm: LLM, num_requests: int) -> tuple[float, float]:
    """Of requests that begin together: tokens a second, and the processor time of the busiest worker."""
    before = processor_s(llm)
    prompts = [[5 + (at * 37 + request * 11) % 2000 for at in range(PROMPT)] for request in range(num_requests)]
    began = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True))
    took = time.perf_counter() - began
    return num_requests * TOKENS / took, max(b - a for a, b in zip(before, processor_s(llm), strict=True))


def measure(num_requests: int, turns: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        with opened(folder, 1) as one, opened(folder, 2) as two:
            for llm in (one, two):
                run(llm, num_requests)
            taken = [(run(one, num_requests), run(two, num_requests)) for _ in range(turns)]
    ratios = [staged[0] / alone[0] for alone, staged in taken]
    allowed = [alone[1] / staged[1] for alone, staged in taken]
    return {
        "requests": num_requests,
        "tokens_per_s_one_process": statistics.median(alone[0] for alone, _ in taken),
        "tokens_per_s_two_stages": statistics.median(staged[0] for _, staged in taken),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ratio_that_processor_time_allows": statistics.median(allowed),
        "target": TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.requests, arguments.turns)
    for name, value in found.items():
        print(f"{name}: {value}")
    if arguments.output is not None:
        write(arguments.output, found)


if __name__ == "__main__":
    main()
