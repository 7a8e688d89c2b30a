"""What adapters cost a decode step on the CPU: none configured, slots configured and unused, and one adapter a stream.

16 streams over random weights in M2's shape (Llama-3.2-1B, bfloat16), 16 adapters of rank 16 on every product. The arms
take turns. Times are of the processor, on one thread: the machine may be shared. Shorter prompts than a real chat's, so
that decode steps are nearly all of it.

    python benchmarks/adapters.py [--rounds 3] [--output benchmarks/results/cpu/adapters.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from anychip import LLM, SamplingParams
from anychip.bench.report import write

STREAMS, RANK, PROMPT, TOKENS = 16, 16, 8, 16
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
PRODUCTS = {
    "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048), "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (8192, 2048), "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}  # fmt: skip
MOST_USED, MOST_UNUSED = 1.25, 1.01


def make_adapter(folder: Path, seed: int) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 16}))
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for name, (rows, columns) in PRODUCTS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            down, up = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)
            tensors[f"{module}.lora_A.weight"] = (down * 0.01).bfloat16()
            tensors[f"{module}.lora_B.weight"] = (up * 0.01).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def opened(folder: Path, **more: object) -> LLM:
    return LLM(
        str(folder), device="cpu", device_options={"threads": "1"}, load_format="dummy", skip_tokenizer=True,
        max_model_len=64, max_num_seqs=STREAMS, prefix_caching=False, executor="inline", **more,
    )  # fmt: skip


def seconds(llm: LLM, adapter: list[str | None] | None) -> float:
    """Of the processor, for one batch."""
    prompts = [[3 + (stream * 31 + at * 7) % 1000 for at in range(PROMPT)] for stream in range(STREAMS)]
    begin = time.process_time()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True), adapter=adapter)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPE))
        adapters = {f"a{seed}": make_adapter(folder / f"a{seed}", seed) for seed in range(STREAMS)}
        with opened(folder) as plain, opened(folder, adapters=adapters) as slots:
            arms = {"none": (plain, None), "unused": (slots, None), "used": (slots, list(adapters))}
            times: dict[str, list[float]] = {arm: [] for arm in arms}
            for _ in range(1 + arguments.rounds):  # the first round warms up
                for arm, (llm, adapter) in arms.items():
                    times[arm].append(seconds(llm, adapter))
    kept = {arm: found[1:] for arm, found in times.items()}
    ratios = {
        arm: [took / base for took, base in zip(kept[arm], kept["none"], strict=True)] for arm in ("unused", "used")
    }
    result = {
        "benchmark": "adapters",
        "command": "python benchmarks/adapters.py",
        "streams": STREAMS,
        "rank": RANK,
        "model": "M2",
        "processor_seconds": {arm: [round(took, 2) for took in found] for arm, found in kept.items()},
        "median_ratio": {arm: round(statistics.median(found), 3) for arm, found in ratios.items()},
        "least_ratio": {arm: round(min(kept[arm]) / min(kept["none"]), 3) for arm in ratios},
        "targets": {"used": MOST_USED, "unused": MOST_UNUSED},
    }
    print(json.dumps(result, indent=1))
    if arguments.output is not None:
        write(arguments.output, result)


if __name__ == "__main__":
    main()
