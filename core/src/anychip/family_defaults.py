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
_MAMBA2_PARTS: dict[str, Any] = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
}
_ONLY_STATES: dict[str, Any] = {"num_attention_heads": 0, "intermediate_size": 0, "max_position_embeddings": 2**20}
"""Of models without attention. No position is their last; requests must have some length."""

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
    "BambaForCausalLM": {**_MAMBA2_PARTS, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "FalconH1ForCausalLM": {**_MAMBA2_PARTS, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "mamba_d_ssm": 1024},
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
    "GraniteMoeHybridForCausalLM": {**_MAMBA2_PARTS, "num_local_experts": 8, "shared_intermediate_size": 1024},
    "JambaForCausalLM": {
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "max_position_embeddings": 262144,
    },
    "Lfm2ForCausalLM": {"num_key_value_heads": 8, "norm_eps": 1e-5, "conv_L_cache": 3, "tie_word_embeddings": True},
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
    "Mamba2ForCausalLM": {
        **_ONLY_STATES,
        "num_heads": 128,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-5,
        "use_conv_bias": True,
    },
    "MambaForCausalLM": {
        **_ONLY_STATES,
        "state_size": 16,
        "expand": 2,
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-5,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
    },
    "MiniMaxForCausalLM": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0},
    "NemotronHForCausalLM": {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "layer_norm_epsilon": 1e-5,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "conv_kernel": 4,
        "time_step_min": 0.001,
        "use_conv_bias": True,
    },
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
    "Qwen3NextForCausalLM": {
        "norm_topk_prob": True,
        "head_dim": 256,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
}
"""By architecture, for those with a native family."""

_ALIASES: Mapping[str, Mapping[str, str]] = {
    "Lfm2ForCausalLM": {"rms_norm_eps": "norm_eps"},
    "Mamba2ForCausalLM": {"rms_norm_eps": "layer_norm_epsilon"},
    "MambaForCausalLM": {"rms_norm_eps": "layer_norm_epsilon"},
    "NemotronHForCausalLM": {"rms_norm_eps": "layer_norm_epsilon"},
}
"""By architecture: fields of model_config.py that its config.json has under another name."""


def with_defaults(architecture: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what its family puts in place of fields that it leaves out. A null is given, not left out, but
    for rope_parameters, whose null means the default in every family."""
    given = {name: value for name, value in document.items() if name != "rope_parameters" or value is not None}
    document = {**FAMILY_DEFAULTS.get(architecture, {}), **given}
    return document | {ours: document[theirs] for ours, theirs in _ALIASES.get(architecture, {}).items()}
