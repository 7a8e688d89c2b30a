"""Seeded random checkpoints of every native family, a few hundred kilobytes each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE

Settings = dict[str, Any]

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


def _deepseek_v2(common: Settings) -> PreTrainedModel:
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
    settings = {**_without(common, "head_dim"), **_LATENT, **groups, "q_lora_rank": None, "tie_word_embeddings": False}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**settings))


def _deepseek_v3(common: Settings) -> PreTrainedModel:
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
    settings = {**_without(common, "head_dim"), **_LATENT, **groups, "tie_word_embeddings": False}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**settings))


def _glm4_moe(common: Settings) -> PreTrainedModel:
    experts = {name: value for name, value in _LATENT.items() if name in _GLM_HAS}
    settings = {"use_qk_norm": True, "attention_bias": True, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
    return Glm4MoeForCausalLM(Glm4MoeConfig(**common, **experts, **settings, tie_word_embeddings=False))


_GLM_HAS = (
    "first_k_dense_replace",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "n_routed_experts",
    "routed_scaling_factor",
)


def _qwen2_moe(common: Settings) -> PreTrainedModel:
    windows = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
    }
    settings = {**_without(common, "head_dim"), **windows, **experts}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings, tie_word_embeddings=False))


def _olmoe(common: Settings) -> PreTrainedModel:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "norm_topk_prob": False}
    settings = {**_without(common, "head_dim"), **experts}
    return OlmoeForCausalLM(OlmoeConfig(**settings, tie_word_embeddings=False))


def _granite_moe(common: Settings) -> PreTrainedModel:
    multipliers = {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    settings = {**_without(common, "head_dim"), **multipliers, **experts}
    return GraniteMoeForCausalLM(GraniteMoeConfig(**settings, tie_word_embeddings=True))


def _minimax_m2(common: Settings) -> PreTrainedModel:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 8}
    settings = {**common, **experts, "intermediate_size": 32}
    return MiniMaxM2ForCausalLM(MiniMaxM2Config(**settings, tie_word_embeddings=False))


_OF_ATTENTION = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
_KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
_MAMBA2_PARTS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}


def _mamba2(common: Settings) -> PreTrainedModel:
    sizes = {"num_heads": 8, "state_size": 16, "n_groups": 2, "chunk_size": 16}
    return Mamba2ForCausalLM(Mamba2Config(**_without(common, *_OF_ATTENTION), **sizes, tie_word_embeddings=False))


def _mamba(common: Settings) -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(**_without(common, *_OF_ATTENTION, "head_dim"), state_size=8))


def _falcon_h1(common: Settings) -> PreTrainedModel:
    multipliers = {
        "embedding_multiplier": 1.5,
        "lm_head_multiplier": 0.5,
        "mlp_multipliers": [0.7, 1.3],
        "key_multiplier": 0.8,
        "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.6,
        "ssm_in_multiplier": 0.9,
        "ssm_out_multiplier": 0.7,
        "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 0.7],
    }
    sizes = {"mamba_d_ssm": 128, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 1}
    config = FalconH1Config(**common, **_MAMBA2_PARTS, **multipliers, **sizes, tie_word_embeddings=False)
    return FalconH1ForCausalLM(config)


def _bamba(common: Settings) -> PreTrainedModel:
    config = BambaConfig(**_without(common, "head_dim"), **_MAMBA2_PARTS, mamba_n_groups=1, attn_layer_indices=[1])
    return BambaForCausalLM(config)


def _granite_hybrid(common: Settings) -> PreTrainedModel:
    multipliers = {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    }
    sizes = {"mamba_n_groups": 1, "num_local_experts": 0, "shared_intermediate_size": 96, "layer_types": _KINDS}
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(**_without(common, "head_dim"), **_MAMBA2_PARTS, **multipliers, **sizes)
    )


def _jamba(common: Settings) -> PreTrainedModel:
    sizes = {"mamba_d_state": 8, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4}
    return JambaForCausalLM(JambaConfig(**_without(common, "head_dim"), **sizes))


def _nemotron_h(common: Settings) -> PreTrainedModel:
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
    kinds = ["linear_attention", "mlp", "full_attention", "linear_attention"]
    common = _without(common, "num_hidden_layers")
    return NemotronHForCausalLM(NemotronHConfig(**common, **sizes, layers_block_type=kinds))


def _lfm2(common: Settings) -> PreTrainedModel:
    kinds = ["conv", "full_attention", "conv", "conv"]
    return Lfm2ForCausalLM(Lfm2Config(**_without(common, "head_dim"), layer_types=kinds, block_multiple_of=32))


def _minimax(common: Settings) -> PreTrainedModel:
    factors = {
        f"{part}_{name}_factor": value
        for part in ("full_attn", "linear_attn", "mlp")
        for name, value in (("alpha", 1.7), ("beta", 0.8))
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16, "layer_types": _KINDS}
    return MiniMaxForCausalLM(MiniMaxConfig(**common, **experts, **factors))


def _qwen3_next(common: Settings) -> PreTrainedModel:
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
    }
    states = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
    }
    return Qwen3NextForCausalLM(Qwen3NextConfig(**common, **experts, **states, tie_word_embeddings=False))


def _olmo2(common: Settings) -> PreTrainedModel:
    return Olmo2ForCausalLM(Olmo2Config(**_without(common, "head_dim"), tie_word_embeddings=False))


def _stablelm(common: Settings) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    settings = {"use_qkv_bias": True, "qk_layernorm": True, "rope_parameters": rope}
    return StableLmForCausalLM(StableLmConfig(**_without(common, "head_dim"), **settings, tie_word_embeddings=False))


def _gpt_neox(common: Settings) -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**_without(common, "head_dim", "num_key_value_heads"), use_parallel_residual=True)
    )


def _phi(common: Settings) -> PreTrainedModel:
    """Falcon's form, attention and feed-forward in parallel after one norm, in code that has the interface."""
    return PhiForCausalLM(PhiConfig(**_without(common, "head_dim"), tie_word_embeddings=False))


def _without(common: Settings, *names: str) -> Settings:
    return {name: value for name, value in common.items() if name not in names}


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
    "deepseek-v2": _deepseek_v2,
    "deepseek-v3": _deepseek_v3,
    "glm4-moe": _glm4_moe,
    "qwen2-moe": _qwen2_moe,
    "olmoe": _olmoe,
    "granite-moe": _granite_moe,
    "minimax-m2": _minimax_m2,
    "mamba2": _mamba2,
    "mamba": _mamba,
    "falcon-h1": _falcon_h1,
    "bamba": _bamba,
    "granite-hybrid": _granite_hybrid,
    "jamba": _jamba,
    "nemotron-h": _nemotron_h,
    "lfm2": _lfm2,
    "minimax": _minimax,
    "qwen3-next": _qwen3_next,
}
"""What has a native family."""

THROUGH_TRANSFORMERS: dict[str, Callable[[Settings], PreTrainedModel]] = {
    "olmo2": _olmo2,
    "stablelm": _stablelm,
    "gpt-neox": _gpt_neox,
    "phi": _phi,
}
"""What has none, and runs in transformers' own code."""


def make_checkpoint(family: str, folder: Path, **settings: Any) -> PreTrainedModel:
    """Saves the family's checkpoint to `folder` and returns the model, in float32 with eager attention. `settings` go
    into its config, for devices that have not every head_dim."""
    makers = {**FAMILIES, **THROUGH_TRANSFORMERS}
    torch.manual_seed(list(makers).index(family))
    model = makers[family]({**_COMMON, **settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Ones and zeros would hide a norm, a bias or a sink that is left out.
            if any(word in name for word in ("norm", "bias", "sinks")) or name.endswith((".D", ".A_log")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # wide enough that it changes who is picked
                buffer.add_(torch.randn_like(buffer) * 0.3)
    model.config._attn_implementation = "eager"
    model.eval().save_pretrained(folder)
    return model
