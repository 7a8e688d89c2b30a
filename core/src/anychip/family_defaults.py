"""What a field of config.json means if it is left out: the defaults of transformers' class of the architecture.
Fields that are missing here have one default for all, in model_config.py, or must be given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WINDOW: dict[str, Any] = {"sliding_window": 4096}
_QWEN: dict[str, Any] = {**_WINDOW, "use_sliding_window": False, "max_window_layers": 28}
_GEMMA: dict[str, Any] = {
    **_WINDOW,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}

_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "DeepseekV2ForCausalLM": {**_LATENT, "n_shared_experts": 2},
    "DeepseekV3ForCausalLM": {
        **_LATENT,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
    },
    "Gemma2ForCausalLM": {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "Gemma3ForCausalLM": _GEMMA,
    "Glm4MoeForCausalLM": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "GptOssForCausalLM": {
        "head_dim": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
    },
    "GraniteForCausalLM": {},
    "GraniteMoeForCausalLM": {"num_experts_per_tok": 2},
    "LlamaForCausalLM": {},
    "MiniMaxM2ForCausalLM": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 5000000.0,
        "num_experts_per_tok": 8,
    },
    "MinistralForCausalLM": {**_WINDOW, "num_key_value_heads": 8},
    "MistralForCausalLM": {**_WINDOW, "num_key_value_heads": 8},
    "MixtralForCausalLM": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "OlmoeForCausalLM": {"rms_norm_eps": 1e-5, "num_experts_per_tok": 8},
    "Phi3ForCausalLM": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "Qwen2ForCausalLM": {**_QWEN, "num_key_value_heads": 32},
    "Qwen2MoeForCausalLM": {
        **_QWEN,
        "num_key_value_heads": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "Qwen3ForCausalLM": {**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
    "Qwen3MoeForCausalLM": {**_QWEN, "num_key_value_heads": 4},
}
"""By architecture, for those with a native family."""


def with_defaults(architecture: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what its family puts in place of fields that it leaves out. A null is given, not left out, but
    for rope_parameters, whose null means the default in every family."""
    given = {name: value for name, value in document.items() if name != "rope_parameters" or value is not None}
    return {**FAMILY_DEFAULTS.get(architecture, {}), **given}
