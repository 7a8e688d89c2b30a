"""Model shapes and workloads of the GPU benchmark. Imports nothing but the standard library: it runs in another
engine's environment too.

Prompts are uniform random token ids. `single` is one stream at 1,024 tokens; `prefill` 8 prompts of 8,192; `step-N` N
prompts of 512; `batch` 512 requests of 256 to 768 tokens that write 64 to 256; `prefix` 256 requests with 64 tokens of
their own after 2,048 that all share and that are in the cache.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

Requests = list[tuple[list[int], int]]
"""Prompts, and how many tokens each writes."""

_COMMON = {
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 16384, "torch_dtype": "bfloat16", "rope_theta": 500000.0,
}  # fmt: skip
SHAPES = {
    "qwen-0.5b": _COMMON | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "tie_word_embeddings": True,
    },
    "llama-8b": _COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 14336, "tie_word_embeddings": False,
    },
    "qwen-30b-a3b": _COMMON | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "tiny": _COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""`tiny` is for trying the benchmark itself on any device."""

_TEXT_IDS = 3
"""Ids below are special."""

STEP_TOKENS = 128
"""Tokens after the first over which a step's time is taken."""

WORKLOADS = ("single", "step-8", "step-32", "step-128", "prefill", "batch", "prefix")


def write_checkpoint(shape: str, folder: Path) -> Path:
    """A folder with a config.json alone: weights are drawn by the engine."""
    place = folder / shape
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))
    return place


def requests(workload: str, vocab_size: int, seed: int, scale: float = 1.0) -> Requests:
    """`scale` shrinks lengths and counts, for trying the benchmark itself."""
    rng = random.Random(f"{workload}-{seed}")

    def size(count: int) -> int:
        return max(1, round(count * scale))

    def prompt(length: int) -> list[int]:
        return [rng.randrange(_TEXT_IDS, vocab_size) for _ in range(length)]

    if workload == "single":
        return [(prompt(size(1024)), 1 + size(STEP_TOKENS))]
    if workload.startswith("step-"):
        return [(prompt(size(512)), 1 + size(STEP_TOKENS)) for _ in range(int(workload.removeprefix("step-")))]
    if workload == "prefill":
        return [(prompt(size(8192)), 1) for _ in range(8)]
    if workload == "batch":
        return [(prompt(size(rng.randint(256, 768))), size(rng.randint(64, 256))) for _ in range(size(512))]
    if workload == "prefix":
        shared = prompt(size(2048))
        return [(shared + prompt(size(64)), size(64)) for _ in range(size(256))]
    raise ValueError(f"workload {workload!r}; there are {', '.join(WORKLOADS)}")


def only_first(asked: Requests) -> Requests:
    """The same, each writing one token."""
    return [(prompt, 1) for prompt, _ in asked]
