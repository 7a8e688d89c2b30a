"""One engine in a process of its own, driven by lines: `compare.py` starts it, and asks for workload after workload.

python benchmarks/cpu/engine.py anychip|vllm|transformers MODEL [--quantization SCHEME] [--speculate ngram]

Prints one JSON line when it is ready, and one for each line read, "WORKLOAD SEED". Everything else goes to stderr.
Needs nothing of the repository but workloads.py and repeating.py, so that it runs in another engine's environment too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

BEGAN = time.perf_counter()
Generate = Callable[[list], None]
MAX_DRAFTS = 5
"""Behind a sequence, whatever proposes them."""


def anychip_engine(model: str, quantization: str | None, speculate: str | None) -> Generate:
    from anychip import LLM, SamplingParams

    sizes: dict = {"max_model_len": 4096, "max_num_seqs": 32}
    drafts = {"speculate": speculate, "max_drafts": MAX_DRAFTS} if speculate else {}
    llm = LLM(model, device="cpu", skip_tokenizer=True, quantization=quantization, **sizes, **drafts)

    def generate(requests: list) -> None:
        prompts = [prompt for prompt, _ in requests]
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in requests]
        llm.generate(prompts, params)

    return generate


def vllm_engine(model: str, quantization: str | None, speculate: str | None) -> Generate:
    given = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    }  # fmt: skip
    os.environ.update({name: value for name, value in given.items() if name not in os.environ})
    from vllm import LLM, SamplingParams

    drafts = {}
    if speculate:
        drafts["speculative_config"] = {
            "method": speculate, "num_speculative_tokens": MAX_DRAFTS, "prompt_lookup_min": 3, "prompt_lookup_max": 3,
        }  # fmt: skip
    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=4096,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        **drafts,
    )

    def generate(requests: list) -> None:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in requests
        ]
        llm.generate(prompts, params, use_tqdm=False)

    return generate


def transformers_engine(model: str, quantization: str | None, speculate: str | None) -> Generate:
    """Eager, one batch of equal lengths after another."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="eager").eval()

    @torch.inference_mode()
    def generate(requests: list) -> None:
        lengths = {(len(prompt), count) for prompt, count in requests}
        assert len(lengths) == 1, "padding would be computed too: workloads a, d, e and f"
        [(_, count)] = lengths
        prompts = torch.tensor([prompt for prompt, _ in requests])
        loaded.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=2, eos_token_id=None,
        )  # fmt: skip

    return generate


ENGINES = {"anychip": anychip_engine, "vllm": vllm_engine, "transformers": transformers_engine}


def measure(generate: Generate, requests: list) -> dict[str, float]:
    """Seconds, and of one stream the seconds of its first token, apart; and the same in processor time."""
    first = processor_first = 0.0
    if len(requests) == 1 and requests[0][1] > 1:
        # Another prompt of the same length: this one would be found in the cache.
        first, processor_first = timed(generate, [([token + 1 for token in requests[0][0]], 1)])
    seconds, processor = timed(generate, requests)
    return {
        "seconds": seconds, "first_s": first, "processor_s": processor, "processor_first_s": processor_first
    }  # fmt: skip


def timed(generate: Generate, requests: list) -> tuple[float, float]:
    """Seconds, and the processor's of this process."""
    began, processor = time.perf_counter(), time.process_time()
    generate(requests)
    return time.perf_counter() - began, time.process_time() - processor


def resident() -> int:
    """Bytes of this process and its children, with what they have mapped."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=tuple(ENGINES))
    parser.add_argument("model")
    parser.add_argument("--quantization")
    parser.add_argument("--speculate")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import workloads

    # An engine must not find our files under the names of packages that it looks for.
    sys.path.remove(str(Path(__file__).parent))
    generate = ENGINES[arguments.engine](arguments.model, arguments.quantization, arguments.speculate)

    def answer(values: dict) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer({"ready_s": time.perf_counter() - BEGAN, "resident": resident()})
    for line in sys.stdin:
        name, seed = line.split()
        answer({**measure(generate, workloads.requests(name, int(seed), arguments.model)), "resident": resident()})


if __name__ == "__main__":
    main()
