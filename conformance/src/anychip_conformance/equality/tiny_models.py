"""Seeded random checkpoints of every native family, a few hundred kilobytes each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from anychip_conformance.equality.tiny_experts import (
    Settings,
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    dots1,
    ernie4_5_moe,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    granite_moe,
    minimax_m2,
    olmoe,
    qwen2_moe,
    without,
)
from anychip_conformance.equality.tiny_hybrids import (
    bamba,
    falcon_h1,
    granite_hybrid,
    granite_hybrid_moe,
    jamba,
    kimi_linear,
    lfm2,
    lfm2_moe,
    mamba,
    mamba2,
    minimax,
    nemotron_h,
    nemotron_h_moe,
    qwen3_5,
    qwen3_5_moe,
    qwen3_next,
    zamba2,
)

_COMMON: Settings = {
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


def _llama(common: Settings) -> PreTrainedModel:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**common, rope_parameters=scaling, tie_word_embeddings=False))


def _qwen3(common: Settings) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**common, tie_word_embeddings=True))


def _qwen3_moe(common: Settings) -> PreTrainedModel:
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts, mlp_only_layers=[1], tie_word_embeddings=False))


def _gemma2(common: Settings) -> PreTrainedModel:
    softcaps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0}
    return Gemma2ForCausalLM(
        Gemma2Config(**common, **softcaps, sliding_window=32, query_pre_attn_scalar=24, tie_word_embeddings=True)
    )


def _gemma3(common: Settings) -> PreTrainedModel:
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **common, sliding_window=32, query_pre_attn_scalar=24, layer_types=kinds, rope_parameters=ropes
        )
    )


def _mistral(common: Settings) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**common, sliding_window=32, tie_word_embeddings=False))


def _mixtral(common: Settings) -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**common, **experts, tie_word_embeddings=False))


def _qwen2(common: Settings) -> PreTrainedModel:
    windows = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**common, **windows, tie_word_embeddings=True))


def _phi3(common: Settings) -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0],
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        "partial_rotary_factor": 0.75,
    }
    settings = {"original_max_position_embeddings": 256, "rope_parameters": rope, "tie_word_embeddings": False}
    return Phi3ForCausalLM(Phi3Config(**common, **settings))


def _granite(common: Settings) -> PreTrainedModel:
    multipliers = {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    }
    return GraniteForCausalLM(GraniteConfig(**common, **multipliers, tie_word_embeddings=True))


def _gpt_oss(common: Settings) -> PreTrainedModel:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}
    return GptOssForCausalLM(GptOssConfig(**common, **experts, rope_parameters=rope, tie_word_embeddings=False))


def _seed_oss(common: Settings) -> PreTrainedModel:
    return SeedOssForCausalLM(SeedOssConfig(**common, tie_word_embeddings=False))


def _ernie4_5(common: Settings) -> PreTrainedModel:
    return Ernie4_5ForCausalLM(Ernie4_5Config(**common, use_bias=True))


def _olmo2(common: Settings) -> PreTrainedModel:
    return Olmo2ForCausalLM(Olmo2Config(**without(common, "head_dim"), tie_word_embeddings=False))


def _stablelm(common: Settings) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    settings = {"use_qkv_bias": True, "qk_layernorm": True, "rope_parameters": rope}
    return StableLmForCausalLM(StableLmConfig(**without(common, "head_dim"), **settings, tie_word_embeddings=False))


def _gpt_neox(common: Settings) -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**without(common, "head_dim", "num_key_value_heads"), use_parallel_residual=True)
    )


def _phi(common: Settings) -> PreTrainedModel:
    """Falcon's form, attention and feed-forward in parallel after one norm, in code that has the interface."""
    return PhiForCausalLM(PhiConfig(**without(common, "head_dim"), tie_word_embeddings=False))


FAMILIES: dict[str, Callable[[Settings], PreTrainedModel]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3-moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "phi3": _phi3,
    "granite": _granite,
    "gpt-oss": _gpt_oss,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
    "glm4-moe": glm4_moe,
    "qwen2-moe": qwen2_moe,
    "olmoe": olmoe,
    "granite-moe": granite_moe,
    "minimax-m2": minimax_m2,
    "mamba2": mamba2,
    "mamba": mamba,
    "falcon-h1": falcon_h1,
    "bamba": bamba,
    "granite-hybrid": granite_hybrid,
    "jamba": jamba,
    "nemotron-h": nemotron_h,
    "lfm2": lfm2,
    "minimax": minimax,
    "qwen3-next": qwen3_next,
    "deepseek-v32": deepseek_v32,
    "glm-5": glm_moe_dsa,
    "qwen3.5": qwen3_5,
    "qwen3.5-moe": qwen3_5_moe,
    "granite-hybrid-moe": granite_hybrid_moe,
    "kimi-linear": kimi_linear,
    "lfm2-moe": lfm2_moe,
    "glm4-moe-lite": glm4_moe_lite,
    "dots1": dots1,
    "ernie4.5": _ernie4_5,
    "ernie4.5-moe": ernie4_5_moe,
    "seed-oss": _seed_oss,
    "zamba2": zamba2,
    "nemotron-h-moe": nemotron_h_moe,
}
"""What has a native family."""

THROUGH_TRANSFORMERS: dict[str, Callable[[Settings], PreTrainedModel]] = {
    "olmo2": _olmo2,
    "stablelm": _stablelm,
    "gpt-neox": _gpt_neox,
    "phi": _phi,
}
"""What has none, and runs in transformers' own code."""


def _seed(family: str) -> int:
    """Another native family changes nobody else's weights."""
    return list(FAMILIES).index(family) if family in FAMILIES else 28 + list(THROUGH_TRANSFORMERS).index(family)


def make_checkpoint(family: str, folder: Path, **settings: Any) -> PreTrainedModel:
    """Saves the family's checkpoint to `folder` and returns the model, in float32 with eager attention. `settings` go
    into its config, for devices that have not every head_dim."""
    makers = {**FAMILIES, **THROUGH_TRANSFORMERS}
    torch.manual_seed(_seed(family))
    model = makers[family]({**_COMMON, **settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Ones and zeros would hide a norm, a bias or a sink that is left out.
            if any(word in name for word in ("norm", "bias", "sinks")) or name.endswith((".D", ".A_log")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):  # wide enough that it changes who is picked
                buffer.add_(torch.randn_like(buffer) * 0.3)
    model.config._attn_implementation = "eager"
    model.eval().save_pretrained(folder)
    return model
