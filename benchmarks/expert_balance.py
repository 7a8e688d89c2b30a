"""How evenly experts are loaded before and after they move, and what steps cost while they do.

A small GPT-OSS with random weights, whose routers pick by Zipf's law with exponent 1.2, decodes on four worker
processes. Its experts lie as the checkpoint numbers them at first, so that the first rank has the busiest ones. Steps
before, between and after moves come from one run. A second run, whose experts stay, says whether tokens differ.

    python benchmarks/expert_balance.py [--output benchmarks/results/expert_balance.json]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from anychip import LLM, SamplingParams
from anychip.bench.report import write

RANKS, EXPERTS, REDUNDANT, LAYERS, EXPONENT = 4, 32, 8, 6, 1.2
REQUESTS, PROMPT, INTERVAL = 32, 8, 40
FOUND_EVEN, SKEWED, LONGEST = 1.15, 2.0, 2.0
_GUMBEL = 1.28
"""The spread of the noise which, added to the logarithms of chances, makes the greatest a draw by them."""


def make_model(folder: Path) -> None:
    """Routers add the logarithms of Zipf's chances to what they make of a token."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, num_local_experts=EXPERTS, num_experts_per_tok=4, sliding_window=64,
        max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    chances = np.arange(1, EXPERTS + 1) ** -EXPONENT
    for layer in model.model.layers:
        router = layer.mlp.router
        router.weight.data.normal_(std=_GUMBEL * config.hidden_size**-0.5)
        router.bias.data.copy_(torch.tensor(np.log(chances / chances.sum())))
    model.save_pretrained(folder)


def run(folder: Path, num_tokens: int, interval: int, redundant: int) -> dict[str, Any]:
    """Seconds from a step's result to the next one's, how many slots had changed by then, imbalance by look, tokens."""
    settings = {"dtype": "float32", "max_model_len": 1024, "num_kv_blocks": 2048, "max_num_seqs": REQUESTS}
    spread = {
        "tensor_parallel_size": RANKS,
        "expert_parallel": True,
        "eplb_interval": interval,
        "num_redundant_experts": redundant,
    }
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 512, PROMPT).tolist() for _ in range(REQUESTS)]
    seconds: list[float] = []
    moved: list[int] = []
    looks: list[float] = []
    with LLM(str(folder), device="cpu", skip_tokenizer=True, overlap=False, **settings, **spread) as llm:
        scheduler, last = llm.engine.scheduler, time.perf_counter()
        update = scheduler.update

        def timed(step: Any, result: Any) -> Any:
            nonlocal last
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
            experts = scheduler.experts
            moved.append(0 if experts is None else experts.moved)
            if experts is not None and (not looks or looks[-1] != experts.imbalance):
                looks.append(experts.imbalance)
            return update(step, result)

        scheduler.update = timed  # type: ignore[method-assign]
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]
    warm = 3
    return {"seconds": seconds[warm:-1], "moved": moved[warm:-1], "looks": looks, "tokens": tokens}


def figures(moving: dict[str, Any], still: dict[str, Any]) -> dict[str, Any]:
    seconds, changes = np.array(moving["seconds"][1:]), np.diff(moving["moved"])
    while_moving, others = seconds[changes > 0] * 1e3, seconds[changes == 0] * 1e3
    median = float(np.median(seconds)) * 1e3
    same = sum(a == b for a, b in zip(moving["tokens"], still["tokens"], strict=True))
    return {
        "imbalance_first_look": round(moving["looks"][0], 3),
        "imbalance_last_look": round(moving["looks"][-1], 3),
        "slots_changed": int(moving["moved"][-1]),
        "steps_with_moves": len(while_moving),
        "median_step_ms": round(median, 3),
        "median_step_with_moves_ms": round(statistics.median(while_moving), 3),
        "longest_step_with_moves_over_median": round(float(while_moving.max()) / median, 2),
        "longest_other_step_over_median": round(float(others.max()) / median, 2),
        "share_of_steps_with_moves_within_2x": round(float((while_moving <= LONGEST * median).mean()), 4),
        "share_of_other_steps_within_2x": round(float((others <= LONGEST * median).mean()), 4),
        "requests_with_the_same_tokens": f"{same} of {len(moving['tokens'])}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        still = run(Path(folder), arguments.tokens, 10**9, REDUNDANT)
        found = figures(run(Path(folder), arguments.tokens, INTERVAL, REDUNDANT), still)
    for name, value in found.items():
        print(f"{name:44}{value}")
    if arguments.output is not None:
        document = {
            "benchmark": "expert_balance",
            "command": f"python benchmarks/expert_balance.py --tokens {arguments.tokens}",
            "ranks": RANKS,
            "experts": EXPERTS,
            "redundant_experts": REDUNDANT,
            "layers": LAYERS,
            "zipf_exponent": EXPONENT,
            "requests": REQUESTS,
            "eplb_interval": INTERVAL,
            "targets": {"first_look_at_least": SKEWED, "last_look_at_most": FOUND_EVEN, "longest_step": LONGEST},
            **found,
        }
        write(arguments.output, document)


if __name__ == "__main__":
    main()
