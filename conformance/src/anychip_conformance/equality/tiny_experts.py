"""Makers of tiny models with latent attention, and of others whose experts are routed in further ways."""

from __future__ import annotations

from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Dots1Config,
    Dots1ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

Settings = dict[str, Any]


def without(common: Settings, *names: str) -> Settings:
    return {name: value for name, value in common.items() if name not in names}


_LATENT: Settings = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "routed_scaling_factor": 1.5,
}


def deepseek_v2(common: Settings) -> PreTrainedModel:
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
    settings = {**without(common, "head_dim"), **_LATENT, **groups, "q_lora_rank": None, "tie_word_embeddings": False}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**settings))


def deepseek_v3(common: Settings) -> PreTrainedModel:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    }
    groups = {"n_group": 2, "topk_group": 1, "q_lora_rank": 24, "attention_bias": True, "rope_parameters": rope}
    settings = {**without(common, "head_dim"), **_LATENT, **groups, "tie_word_embeddings": False}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**settings))


_INDEX: Settings = {"index_topk": 24, "index_head_dim": 16, "index_n_heads": 16, "q_lora_rank": 24}
"""With few index heads a token's products may all be negative. Its score is zero then, as others' are, and transformers
picks any of them."""


def deepseek_v32(common: Settings) -> PreTrainedModel:
    groups = {"n_group": 2, "topk_group": 1}
    settings = {**without(common, "head_dim"), **_LATENT, **_INDEX, **groups, "tie_word_embeddings": False}
    return DeepseekV32ForCausalLM(DeepseekV32Config(**settings))


def glm_moe_dsa(common: Settings) -> PreTrainedModel:
    sharing = {"n_group": 1, "topk_group": 1, "indexer_types": ["full", "shared", "full", "shared"]}
    settings = {**sharing, **without(common, "head_dim"), **_LATENT, **_INDEX, "tie_word_embeddings": False}
    return GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**settings))


def glm4_moe(common: Settings) -> PreTrainedModel:
    experts = {name: value for name, value in _LATENT.items() if name in _GLM_HAS}
    settings = {"use_qk_norm": True, "attention_bias": True, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
    return Glm4MoeForCausalLM(Glm4MoeConfig(**{**experts, **common}, **settings, tie_word_embeddings=False))


_GLM_HAS = (
    "first_k_dense_replace",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "n_routed_experts",
    "routed_scaling_factor",
)


def glm4_moe_lite(common: Settings) -> PreTrainedModel:
    latent = without(_LATENT, "first_k_dense_replace")
    settings = {**without(common, "head_dim"), **latent, "q_lora_rank": 24, "n_group": 2, "topk_group": 1}
    return Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**settings, tie_word_embeddings=False))


def dots1(common: Settings) -> PreTrainedModel:
    experts = {name: value for name, value in _LATENT.items() if name in _GLM_HAS}
    settings = {"n_group": 2, "topk_group": 1, "n_shared_experts": 2, "norm_topk_prob": True}
    windows = {"sliding_window": 32, "max_window_layers": 2}
    return Dots1ForCausalLM(Dots1Config(**common, **experts, **settings, **windows, tie_word_embeddings=False))


def ernie4_5_moe(common: Settings) -> PreTrainedModel:
    experts = {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32, "moe_num_shared_experts": 2}
    return Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**without(common, "head_dim"), **experts))


def qwen2_moe(common: Settings) -> PreTrainedModel:
    windows = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
    }
    settings = {**without(common, "head_dim"), **windows, **experts}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings, tie_word_embeddings=False))


def olmoe(common: Settings) -> PreTrainedModel:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "norm_topk_prob": False}
    settings = {**without(common, "head_dim"), **experts}
    return OlmoeForCausalLM(OlmoeConfig(**settings, tie_word_embeddings=False))


def granite_moe(common: Settings) -> PreTrainedModel:
    multipliers = {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    settings = {**without(common, "head_dim"), **multipliers, **experts}
    return GraniteMoeForCausalLM(GraniteMoeConfig(**settings, tie_word_embeddings=True))


def minimax_m2(common: Settings) -> PreTrainedModel:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 8}
    settings = {**common, **experts, "intermediate_size": 32}
    return MiniMaxM2ForCausalLM(MiniMaxM2Config(**settings, tie_word_embeddings=False))
