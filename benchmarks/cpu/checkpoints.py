"""The models that are measured: shapes of known ones, random weights in bfloat16, no tokenizer.

python benchmarks/cpu/checkpoints.py FOLDER [NAME ...]

M1: Qwen2.5-0.5B · M2: Llama-3.2-1B · M3: a small Qwen3 mixture, 32 experts of which 4 work on a token · M4: layers of
DeepSeek-V2-Lite, 1.0 billion parameters · M5: layers of Qwen3-Next, three of four with states, 1.1 billion
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

COMMON = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 8192}
CONFIGS = {
    "M1": Qwen2Config(
        vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, tie_word_embeddings=True, rms_norm_eps=1e-6, **COMMON,
    ),
    "M2": LlamaConfig(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, intermediate_size=8192, tie_word_embeddings=True, rms_norm_eps=1e-5, **COMMON,
    ),
    "M3": Qwen3MoeConfig(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, intermediate_size=2048, moe_intermediate_size=512, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False, rms_norm_eps=1e-6,
        **COMMON,
    ),
    "M4": DeepseekV2Config(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
        q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        intermediate_size=5504, moe_intermediate_size=512, n_routed_experts=32, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, topk_method="greedy", norm_topk_prob=False, **COMMON,
    ),
    "M5": Qwen3NextConfig(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=2,
        head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, moe_intermediate_size=256, shared_expert_intermediate_size=256, num_experts=32,
        num_experts_per_tok=8, norm_topk_prob=True, **COMMON,
    ),
}  # fmt: skip


def main() -> None:
    for name, config in CONFIGS.items():
        folder = Path(sys.argv[1], name)
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        if not (folder / "config.json").exists():
            torch.manual_seed(1234)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        print(folder)


if __name__ == "__main__":
    main()
