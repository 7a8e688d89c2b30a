"""What GGUF files hold: random blocks, and what llama.cpp's converter would make of a tiny model.

The conversion follows convert_hf_to_gguf.py: names, paired rows, norms with 1 added, stacked experts, rotary factors as
a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gguf_metadata import Stored
from torch import Tensor

from anychip.gguf.block_types import BY_NAME


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes of a row]: any codes, and scales that are small numbers, so that products stay in range."""
    stored = BY_NAME[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // stored.size, stored.nbytes), dtype=np.uint8)
    for place in _HALVES[kind]:
        halves = rng.normal(0, _SPREAD.get(kind, 0.01), len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(118, 124, len(blocks))
    return blocks.reshape(rows, -1)


_HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip
"""Where a block has float16 scales."""
_SPREAD = {
    "Q8_0": 1e-3,
    "Q3_K": 1e-3,
    "Q2_K": 5e-3,
    "Q4_K": 3e-4,
    "Q5_K": 2e-4,
    "Q6_K": 3e-5,
    "IQ4_XS": 1e-4,
    "IQ4_NL": 1e-3,
}


# -- a tiny model as llama.cpp's converter would write it ---------------------------------------------------------

_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.qkv_proj": "attn_qkv", "self_attn.sinks": "attn_sinks",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp", "mlp.gate.e_score_correction_bias": "exp_probs_b",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = {
    "deepseek-v2": "deepseek2", "deepseek-v3": "deepseek2", "qwen3-moe": "qwen3moe", "mixtral": "llama",
    "mistral": "llama",
}  # fmt: skip


def convert(family: str, model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and tensors with the names of a GGUF file, of a transformers model."""
    architecture = _ARCHITECTURES.get(family, family)
    config = model.config
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for theirs, held in _converted(family, architecture, config, name, tensor.detach()):
            tensors[theirs] = held
    if config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    metadata = {"general.architecture": architecture, **_settings(architecture, config)}
    tensors |= _rotary(architecture, config, metadata)
    return metadata, _stacked(tensors)


def _converted(family: str, architecture: str, config: Any, name: str, tensor: Tensor):
    module, _, end = name.rpartition(".")
    if end not in ("weight", "bias"):
        module, end = name, ""
    if architecture in ("gemma2", "gemma3") and module.endswith("norm"):
        tensor = tensor + 1
    if module in _OUTSIDE:
        yield f"{_OUTSIDE[module]}.{end}", tensor
        return
    _, _, layer, part = module.split(".", 3)
    block = f"blk.{layer}"
    if (
        ".experts." in part
        or part.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        or part.startswith("experts")
    ):
        yield from _experts(architecture, block, part, tensor)
        return
    if architecture in ("llama", "granite") and part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    if part == "self_attn.kv_b_proj":
        by_head = tensor.view(config.num_attention_heads, -1, tensor.shape[1])
        keys, values = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield f"{block}.attn_k_b.weight", keys.transpose(1, 2)
        yield f"{block}.attn_v_b.weight", values
        return
    if part == "mlp.gate.e_score_correction_bias":
        end = "bias"
    if part == "post_attention_layernorm":
        theirs = "post_attention_norm" if architecture in ("gemma2", "gemma3", "gpt-oss") else "ffn_norm"
    else:
        theirs = _NAMES[part]
    yield f"{block}.{theirs}.{end or 'weight'}", tensor


def _experts(architecture: str, block: str, part: str, tensor: Tensor):
    """transformers stacks gate on up, [experts, 2 * features, inputs]; of GPT-OSS they take turns, inputs first."""
    if part.endswith("gate_up_proj_bias"):
        yield f"{block}.ffn_gate_exps.bias", tensor[:, 0::2]
        yield f"{block}.ffn_up_exps.bias", tensor[:, 1::2]
    elif part.endswith("down_proj_bias"):
        yield f"{block}.ffn_down_exps.bias", tensor
    elif part.endswith("gate_up_proj"):
        turned = tensor.transpose(1, 2) if architecture == "gpt-oss" else tensor
        half = turned.shape[1] // 2
        gate, up = (turned[:, 0::2], turned[:, 1::2]) if architecture == "gpt-oss" else turned.split(half, dim=1)
        yield f"{block}.ffn_gate_exps.weight", gate
        yield f"{block}.ffn_up_exps.weight", up
    else:
        yield f"{block}.ffn_down_exps.weight", tensor.transpose(1, 2) if architecture == "gpt-oss" else tensor


def _stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().float() for name, tensor in tensors.items()}


def _settings(architecture: str, config: Any) -> dict[str, Any]:
    if architecture == "deepseek2":
        return {f"{architecture}.{key}": value for key, value in _of_latents(config).items()}
    rope = dict(config.rope_parameters or {})
    full = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    given: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(full.get("rope_theta", 10000.0)),
        "rope.dimension_count": int(head_dim * full.get("partial_rotary_factor", 1.0)),
    }
    if architecture == "starcoder2":
        given["attention.layer_norm_epsilon"] = float(config.norm_epsilon)
    else:
        given["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        given |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        given["expert_feed_forward_length"] = getattr(config, "moe_intermediate_size", config.intermediate_size)
    if architecture in ("gemma2", "gemma3"):
        given["attention.scale"] = float(config.query_pre_attn_scalar) ** -0.5
    if architecture in ("gemma2", "gemma3", "gpt-oss"):
        given["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        given["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        given["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if architecture == "gemma3":
        given["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    if architecture == "granite":
        given |= {
            "attention.scale": float(config.attention_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    if full.get("rope_type") in ("linear", "yarn"):
        given |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": float(full["factor"])}
        if "original_max_position_embeddings" in full:
            given["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    if full.get("rope_type") == "longrope":
        given["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    return {f"{architecture}.{key}": value for key, value in given.items()}


def _of_latents(config: Any) -> dict[str, Any]:
    """Newer files: the sizes of heads as the latent has them, and those of the checkpoint under names of their own."""
    rope, rotated, latent = config.rope_parameters, config.qk_rope_head_dim, config.kv_lora_rank
    given: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": latent + rotated,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_nope_head_dim + rotated,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": latent,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": rotated,
        "rope.freq_base": float(rope["rope_theta"]),
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": getattr(config, "num_experts", None) or config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(getattr(config, "norm_topk_prob", False)),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": 2 if type(config).__name__ == "DeepseekV3Config" else 1,
    }
    if config.q_lora_rank:
        given["attention.q_lora_rank"] = config.q_lora_rank
    if rope.get("rope_type") == "yarn":
        given |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        given["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        given["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return given


def _rotary(architecture: str, config: Any, metadata: dict[str, Any]) -> dict[str, Tensor]:
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"]) for which in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    base, factor, original = rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]
    low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
    factors = []
    for index in range(0, config.head_dim, 2):
        length = 2 * math.pi * base ** (index / config.head_dim)
        if length < high:
            factors.append(1.0)
        elif length > low:
            factors.append(factor)
        else:
            smooth = (original / length - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": torch.tensor(factors)}


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """As F32."""
    return {name: ("F32", tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in tensors.items()}
