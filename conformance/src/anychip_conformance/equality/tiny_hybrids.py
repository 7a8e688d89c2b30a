"""Makers of tiny models with layers that keep states."""

from __future__ import annotations

from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from anychip_conformance.equality.tiny_experts import Settings, without

_OF_ATTENTION = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
_KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
_MAMBA2_PARTS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}


def mamba2(common: Settings) -> PreTrainedModel:
    sizes = {"num_heads": 8, "state_size": 16, "n_groups": 2, "chunk_size": 16}
    return Mamba2ForCausalLM(Mamba2Config(**without(common, *_OF_ATTENTION), **sizes, tie_word_embeddings=False))


def mamba(common: Settings) -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(**without(common, *_OF_ATTENTION, "head_dim"), state_size=8))


def falcon_h1(common: Settings) -> PreTrainedModel:
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


def bamba(common: Settings) -> PreTrainedModel:
    config = BambaConfig(**without(common, "head_dim"), **_MAMBA2_PARTS, mamba_n_groups=1, attn_layer_indices=[1])
    return BambaForCausalLM(config)


def granite_hybrid(common: Settings, num_experts: int = 0) -> PreTrainedModel:
    multipliers = {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    }
    sizes = {"mamba_n_groups": 1, "shared_intermediate_size": 96, "layer_types": _KINDS}
    experts = {"num_local_experts": num_experts, "num_experts_per_tok": 2}
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(**without(common, "head_dim"), **_MAMBA2_PARTS, **multipliers, **sizes, **experts)
    )


def granite_hybrid_moe(common: Settings) -> PreTrainedModel:
    return granite_hybrid({**common, "intermediate_size": 32}, num_experts=4)


def jamba(common: Settings) -> PreTrainedModel:
    sizes = {"mamba_d_state": 8, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4}
    return JambaForCausalLM(JambaConfig(**without(common, "head_dim"), **sizes))


def nemotron_h(common: Settings) -> PreTrainedModel:
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
    kinds = ["linear_attention", "mlp", "full_attention", "linear_attention"]
    common = without(common, "num_hidden_layers")
    return NemotronHForCausalLM(NemotronHConfig(**common, **sizes, layers_block_type=kinds))


def nemotron_h_moe(common: Settings) -> PreTrainedModel:
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_group": 2}
    experts |= {"moe_shared_expert_intermediate_size": 48, "topk_group": 1, "routed_scaling_factor": 1.5}
    kinds = ["linear_attention", "moe", "full_attention", "moe"]
    settings = without(common, "num_hidden_layers")
    return NemotronHForCausalLM(NemotronHConfig(**settings, **sizes, **experts, layers_block_type=kinds))


def lfm2(common: Settings) -> PreTrainedModel:
    kinds = ["conv", "full_attention", "conv", "conv"]
    return Lfm2ForCausalLM(Lfm2Config(**without(common, "head_dim"), layer_types=kinds, block_multiple_of=32))


def minimax(common: Settings) -> PreTrainedModel:
    factors = {
        f"{part}_{name}_factor": value
        for part in ("full_attn", "linear_attn", "mlp")
        for name, value in (("alpha", 1.7), ("beta", 0.8))
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16, "layer_types": _KINDS}
    return MiniMaxForCausalLM(MiniMaxConfig(**common, **experts, **factors))


def qwen3_next(common: Settings) -> PreTrainedModel:
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
    }
    return Qwen3NextForCausalLM(Qwen3NextConfig(**common, **experts, **_DELTA_NET, tie_word_embeddings=False))


def qwen3_5(common: Settings) -> PreTrainedModel:
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**common, **_DELTA_NET, layer_types=_KINDS, tie_word_embeddings=False))


def qwen3_5_moe(common: Settings) -> PreTrainedModel:
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    }
    settings = {**without(common, "intermediate_size"), **experts, **_DELTA_NET, "layer_types": _KINDS}
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**settings, tie_word_embeddings=False))


def kimi_linear(common: Settings) -> PreTrainedModel:
    latent = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "routed_scaling_factor": 1.5}
    states = {"linear_head_dim": 16, "linear_num_heads": 4, "layer_types": _KINDS}
    settings = {**without(common, "head_dim"), "num_key_value_heads": 4, **latent, **experts, **states}
    return KimiLinearForCausalLM(KimiLinearConfig(**settings, n_group=2, topk_group=1))


def lfm2_moe(common: Settings) -> PreTrainedModel:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1}
    kinds = ["conv", "full_attention", "conv", "conv"]
    settings = {**without(common, "head_dim"), **experts, "routed_scaling_factor": 1.5}
    return Lfm2MoeForCausalLM(Lfm2MoeConfig(**settings, layer_types=kinds))


def zamba2(common: Settings) -> PreTrainedModel:
    """Of three uses of two shared blocks, the third is the first block's second."""
    states = {"n_mamba_heads": 8, "mamba_d_state": 16, "mamba_ngroups": 2, "chunk_size": 16}
    shared = {"num_mem_blocks": 2, "use_shared_attention_adapter": True, "adapter_rank": 4, "use_mem_rope": True}
    settings = {**without(common, "head_dim"), "num_key_value_heads": 4, **states, **shared}
    kinds = ["hybrid", "linear_attention", "hybrid", "hybrid"]
    return Zamba2ForCausalLM(Zamba2Config(**settings, layers_block_type=kinds, tie_word_embeddings=True))
