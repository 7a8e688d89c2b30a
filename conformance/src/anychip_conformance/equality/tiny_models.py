"""Seeded random checkpoints of every native family, a few hundred kilobytes each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 512
NUM_LAYERS = 4
HIDDEN_SIZE = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Wide enough that logits differ and every layer matters.
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _llama() -> PreTrainedModel:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**_COMMON, rope_parameters=scaling, tie_word_embeddings=False))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_COMMON, tie_word_embeddings=True))


def _qwen3_moe() -> PreTrainedModel:
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_COMMON, **experts, mlp_only_layers=[1], tie_word_embeddings=False))


def _gemma2() -> PreTrainedModel:
    softcaps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0}
    return Gemma2ForCausalLM(
        Gemma2Config(**_COMMON, **softcaps, sliding_window=32, query_pre_attn_scalar=24, tie_word_embeddings=True)
    )


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3-moe": _qwen3_moe,
    "gemma2": _gemma2,
}


def make_checkpoint(family: str, folder: Path) -> PreTrainedModel:
    """Saves the family's checkpoint to `folder` and returns the model, in float32 with eager attention."""
    torch.manual_seed(list(FAMILIES).index(family))
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones (zeros for Gemma) would hide a norm that is left out
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config._attn_implementation = "eager"
    model.eval().save_pretrained(folder)
    return model
