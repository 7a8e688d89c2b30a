"""Every causal language model that the installed transformers registers, and a tiny seeded checkpoint of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE

Settings = dict[str, Any]

_SIZES: dict[Any, tuple[str, ...]] = {
    VOCAB_SIZE: ("vocab_size", "decoder_vocab_size", "n_words", "vocab_size_per_layer_input", "unpadded_vocab_size"),
    HIDDEN_SIZE: (
        *("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "input_embedding_size"),
        *("output_embedding_size", "word_embed_proj_dim", "attention_hidden_size", "rotary_dim_of_whole"),
    ),
    NUM_LAYERS: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
        *("encoder_layers", "num_encoder_layers"),
        "num_local_experts",
        *("num_experts", "n_routed_experts", "moe_num_experts", "num_attention_heads", "n_head", "n_heads"),
        *("num_heads", "attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"),
        *("encoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads", "index_n_heads"),
    ),
    1: ("num_layers_per_stack", "n_shared_experts", "n_group", "topk_group", "num_expert_group"),
    2: (
        *("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_experts_per_tok", "moe_k", "moe_topk"),
        *("num_experts_per_token", "top_k_experts"),
    ),
    16: ("head_dim", "kv_channels", "dim_head", "qk_nope_head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"),
    20: ("kv_lora_rank",),
    8: ("qk_rope_head_dim", "rotary_dim"),
    24: ("qk_head_dim",),
    32: (
        *("q_lora_rank", "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
        *("shared_intermediate_size", "shared_experts_intermediate_size", "sliding_window", "attention_window_size"),
        *("window_size", "local_attention", "index_head_dim", "hidden_size_per_layer_input"),
    ),
    96: (
        *("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"),
        *("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"),
    ),
    256: ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "max_target_positions", "n_ctx"),
    # Wide enough that logits differ and every layer matters.
    0.15: ("initializer_range", "init_std"),
    0: ("decoder_start_token_id", "num_nextn_predict_layers"),
}
"""Tiny values, by the names under which config classes know them."""

_TINY: Settings = {name: value for value, names in _SIZES.items() for name in names}

_TOKENS: Settings = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

_HEADS = ("num_key_value_heads", "head_dim")
"""What is set even where a class's default is to work it out."""

_KINDS = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
_GEMMA_4: Settings = {"layer_types": _KINDS, "num_kv_shared_layers": 2, "global_head_dim": 16}
_ROPE: Settings = {"rope_type": "default", "rope_theta": 10000.0}

_OTHERWISE: dict[str, Settings] = {
    "cohere_compass_text": {"layer_types": _KINDS, "rope_parameters": dict.fromkeys(_KINDS, _ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN_SIZE},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2)},
    "longcat_flash": {"head_dim": 8},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3n_text": {"layer_types": _KINDS, "num_kv_shared_layers": 2, "intermediate_size": 96},
    "gemma4_text": _GEMMA_4,
    "gemma4_unified_text": _GEMMA_4,
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48]},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]]},
    "hunyuan_v1_dense": {"rope_parameters": _ROPE},
    "hunyuan_v1_moe": {"rope_parameters": _ROPE},
}
"""What a class needs beside the sizes, by model_type."""

DECODERS: Settings = {"is_decoder": True}
"""Encoders that decode if their config says so."""


@dataclass(frozen=True, slots=True)
class CausalClass:
    """A config's model_type and the class that transformers makes a causal language model of it with."""

    model_type: str
    name: str

    @property
    def cls(self) -> type[PreTrainedModel]:
        cls: type[PreTrainedModel] = getattr(transformers, self.name)
        return cls


def causal_classes() -> Iterator[CausalClass]:
    """One of each class: several model types may share one."""
    types: dict[str, list[str]] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        types.setdefault(names if isinstance(names, str) else names[0], []).append(model_type)
    for name, several in types.items():
        own = getattr(transformers, name).config_class.model_type
        yield CausalClass(own if own in several else several[0], name)


def tiny_config(each: CausalClass) -> Any:
    """The class's own defaults but for sizes."""
    config_class = each.cls.config_class
    known = config_class().to_dict()
    settings = {name: value for name, value in _TINY.items() if name in known and (known[name] or name in _HEADS)}
    if "is_decoder" in known:
        settings |= DECODERS
    settings |= {name: value for name, value in _TOKENS.items() if name in known}
    if "qk_rope_head_dim" in known:
        # Latent attention: heads have keys of their own, and head_dim is what is rotated.
        settings["num_key_value_heads"] = settings["num_attention_heads"]
        settings.pop("head_dim", None)
    return config_class(**{**settings, **_OTHERWISE.get(each.model_type, {})})


def save_tiny(each: CausalClass, folder: Path) -> PreTrainedModel:
    """A seeded checkpoint in `folder`, and its model in float32."""
    torch.manual_seed(1)
    model = each.cls(tiny_config(each)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Ones and zeros would hide a norm, a bias or a sink that is left out.
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    # Some force a first or a last token, which is no matter of the model's.
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=2)
    model.save_pretrained(folder)
    return model
