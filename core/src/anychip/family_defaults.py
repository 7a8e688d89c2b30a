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

_DELTA_NET: dict[str, Any] = {
    "head_dim": 256,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}

_SPARSE: dict[str, Any] = {
    **_LATENT,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "index_topk": 2048,
    "index_head_dim": 128,
}

_BERT: dict[str, Any] = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
_ROBERTA: dict[str, Any] = {**_BERT, "pad_token_id": 1}

ENCODERS = ("Bert", "DistilBert", "Gemma3Text", "MPNet", "ModernBert", "NomicBert", "Roberta", "XLMRoberta")
"""What the names of architectures begin with whose tokens all see each other."""

_BARE = ("Gemma3Text",)
"""Of these, those that are encoders without a head alone."""

_RENAMED: Mapping[str, Mapping[str, str]] = {
    "Ernie4_5_MoeForCausalLM": {"moe_k": "num_experts_per_tok", "moe_num_experts": "num_experts"},
    "KimiLinearForCausalLM": {
        "model_max_length": "max_position_embeddings",
        "moe_renormalize": "norm_topk_prob",
        "num_expert_group": "n_group",
        "num_experts": "num_local_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "num_shared_experts": "n_shared_experts",
    },
    "Lfm2ForCausalLM": {"norm_eps": "rms_norm_eps"},
    "Lfm2MoeForCausalLM": {"norm_eps": "rms_norm_eps", "tie_embedding": "tie_word_embeddings"},
    "Mamba2ForCausalLM": {"layer_norm_epsilon": "rms_norm_eps"},
    "MambaForCausalLM": {"layer_norm_epsilon": "rms_norm_eps"},
    "NemotronHForCausalLM": {"layer_norm_epsilon": "rms_norm_eps"},
    "Starcoder2ForCausalLM": {"norm_epsilon": "rms_norm_eps"},
    "Zamba2ForCausalLM": {"attention_head_dim": "head_dim"},
    "DistilBertModel": {
        "dim": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
    },
    "NomicBertModel": {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
        "rotary_emb_base": "rope_theta",
    },
}
"""Fields that a family calls otherwise than others do."""

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
    "DeepseekV32ForCausalLM": {**_SPARSE, "index_n_heads": 64, "n_group": 8, "topk_group": 4},
    "GlmMoeDsaForCausalLM": {
        **_SPARSE,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rms_norm_eps": 1e-5,
        "index_n_heads": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    "Dots1ForCausalLM": {
        **_WINDOW,
        "num_key_value_heads": 32,
        "max_window_layers": 62,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "max_position_embeddings": 2048,
    },
    "Ernie4_5ForCausalLM": {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "Ernie4_5_MoeForCausalLM": {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
    },
    "BambaForCausalLM": {**_MAMBA2_PARTS, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "FalconH1ForCausalLM": {**_MAMBA2_PARTS, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "mamba_d_ssm": 1024},
    "BertModel": _BERT,
    "DistilBertModel": {"hidden_act": "gelu", "max_position_embeddings": 512},
    "MPNetModel": {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "pad_token_id": 1},
    "ModernBertModel": {"max_position_embeddings": 8192},
    "NomicBertModel": {**_BERT, "hidden_act": "silu", "max_position_embeddings": 2048, "rope_theta": 1000.0},
    "RobertaModel": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "Gemma2ForCausalLM": {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "Gemma3ForCausalLM": _GEMMA,
    "Gemma3TextModel": _GEMMA,
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
    "Glm4MoeLiteForCausalLM": {
        **_LATENT,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
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
    "GraniteMoeHybridForCausalLM": {
        **_MAMBA2_PARTS,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
    },
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
    "KimiLinearForCausalLM": {
        **_LATENT,
        "q_lora_rank": None,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1024,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 1048576,
    },
    "Lfm2MoeForCausalLM": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "conv_L_cache": 3,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1792,
        "max_position_embeddings": 128000,
        "tie_word_embeddings": True,
    },
    "Lfm2ForCausalLM": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "conv_L_cache": 3, "tie_word_embeddings": True},
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
        "rms_norm_eps": 1e-5,
        "use_conv_bias": True,
    },
    "MambaForCausalLM": {
        **_ONLY_STATES,
        "state_size": 16,
        "expand": 2,
        "conv_kernel": 4,
        "rms_norm_eps": 1e-5,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
    },
    "MiniMaxForCausalLM": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0},
    "NemotronHForCausalLM": {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "conv_kernel": 4,
        "time_step_min": 0.001,
        "use_conv_bias": True,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "n_group": 1,
        "topk_group": 1,
    },
    "Phi3ForCausalLM": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "Starcoder2ForCausalLM": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
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
    "Qwen3NextForCausalLM": {**_DELTA_NET, "norm_topk_prob": True},
    "Qwen3_5ForCausalLM": {**_DELTA_NET, "num_key_value_heads": 4},
    "Qwen3_5MoeForCausalLM": {
        **_DELTA_NET,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "intermediate_size": 0,
    },
    "SeedOssForCausalLM": {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    "Zamba2ForCausalLM": {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "mamba_d_state": 64,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "time_step_min": 0.001,
        "num_mem_blocks": 1,
        "adapter_rank": 128,
    },
}
"""By architecture, for those with a native family."""

_BODIES = ("ForSequenceClassification", "ForMaskedLM", "Model")
"""Endings of architectures that are a family's layers with another head, or without any."""


def base_architecture(architecture: str) -> str:
    """The architecture under which a family is known that has these layers, whatever the head behind them."""
    for ending in _BODIES:
        if architecture.endswith(ending):
            stem = architecture.removesuffix(ending)
            encodes = stem in ENCODERS and (stem not in _BARE or ending == "Model")
            return f"{stem}Model" if encodes else f"{stem}ForCausalLM"
    return architecture


def is_encoder(architecture: str) -> bool:
    """Whether all tokens of a sequence see each other, as far as native families go."""
    return base_architecture(architecture).removesuffix("Model") in ENCODERS


def first_position(architecture: str, document: Mapping[str, Any]) -> int:
    """Learned positions that stand before the first token's: RoBERTa counts on from its padding token's id."""
    base = base_architecture(architecture)
    if base in ("RobertaModel", "XLMRobertaModel"):
        return int(document["pad_token_id"]) + 1
    return 2 if base == "MPNetModel" else 0


def with_defaults(architecture: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what its family puts in place of fields that it leaves out. A null is given, not left out, but
    for rope_parameters, whose null means the default in every family."""
    given = {name: value for name, value in document.items() if name != "rope_parameters" or value is not None}
    base = base_architecture(architecture)
    renamed = _RENAMED.get(base, {})
    given = {renamed.get(name, name): value for name, value in given.items()}
    return {**FAMILY_DEFAULTS.get(base, {}), **given}
