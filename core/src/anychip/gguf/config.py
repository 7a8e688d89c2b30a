"""The config.json and generation_config.json that a GGUF file stands for. Reads metadata, and the small tensors of
rotary factors.

Sources: transformers' config classes of the families; llama.cpp's src/llama-model.cpp for what its settings mean.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping
from typing import Any

from anychip.errors import CheckpointError, ConfigError
from anychip.gguf.eog import end_token_ids
from anychip.gguf.families import DEEPSEEK_V3, FAMILIES, MIXTRAL, Family
from anychip.gguf.header import StoredTensor
from anychip.gguf.metadata import Metadata
from anychip.gguf.model import GGUFModel

Settings = dict[str, Any]

QUANT_METHOD = "gguf"
"""The quantization_config.quant_method under which quantization/gguf.py reads such files."""


def family_of(model: GGUFModel) -> Family:
    """Raises ConfigError for an architecture that no family here serves."""
    metadata = model.metadata
    family = FAMILIES.get(metadata.architecture)
    if family is None:
        raise ConfigError(
            f"{metadata.path} is of the architecture {metadata.architecture!r}, which is not served from GGUF; served "
            f"are {', '.join(FAMILIES)}: serve the model's Hugging Face checkpoint instead"
        )
    if family is FAMILIES["llama"] and metadata.integer(metadata.own("expert_count")):
        return MIXTRAL
    if metadata.architecture == "deepseek2" and metadata.integer(metadata.own("expert_gating_func")) == _SIGMOID:
        return DEEPSEEK_V3
    return family


_SIGMOID = 2
"""Of expert_gating_func."""


def config_of(model: GGUFModel) -> Settings:
    """config.json. Raises ConfigError as family_of, CheckpointError for metadata that is missing or wrong."""
    metadata, tensors = model.metadata, model.tensors
    family = family_of(model)
    own = metadata.own
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{metadata.path} has no tensor 'token_embd.weight' of two dimensions")
    heads, width = metadata.need(own("attention.head_count")), metadata.need(own("embedding_length"))
    settings: Settings = {
        "architectures": [family.architecture],
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "num_hidden_layers": metadata.need(own("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(own("attention.head_count_kv")) or heads,
        "head_dim": metadata.integer(own("attention.key_length")) or width // heads,
        "intermediate_size": _feed_forward(metadata),
        "max_position_embeddings": metadata.need(own("context_length")),
        "rms_norm_eps": metadata.number(own("attention.layer_norm_rms_epsilon")) or 1e-5,
        "rope_theta": metadata.number(own("rope.freq_base")) or 10000.0,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": _dtype(tensors),
        "attention_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    if family.latent:
        settings |= {"head_dim": metadata.need(own("rope.dimension_count")), "num_key_value_heads": heads}
    else:
        _check_heads(metadata, settings)
    if scaling := _rope_scaling(model, settings):
        settings["rope_scaling"] = scaling
    if family.experts is not None:
        settings["num_local_experts"] = metadata.need(own("expert_count"))
        settings["num_experts_per_tok"] = metadata.need(own("expert_used_count"))
    settings |= _OF_FAMILY.get(metadata.architecture, _nothing)(model, settings)
    if family.experts is not None or any(not tensor.type.is_plain for tensor in tensors.values()):
        settings["quantization_config"] = {"quant_method": QUANT_METHOD}
    return settings


def _check_heads(metadata: Metadata, settings: Settings) -> None:
    """Raises ConfigError for heads that no native family has."""
    dim, own = settings["head_dim"], metadata.own
    for key in ("attention.value_length", "rope.dimension_count"):
        given = metadata.integer(own(key))
        if given not in (None, dim) and (key, metadata.architecture) != ("rope.dimension_count", "phi3"):
            raise ConfigError(
                f"{metadata.path} has {own(key)} {given} and heads of {dim}: {metadata.architecture} here has one size "
                "for both; serve the model's Hugging Face checkpoint instead"
            )


def generation_of(metadata: Metadata) -> Settings:
    """generation_config.json: the tokens that end a text, and what the file recommends for sampling."""
    settings: Settings = {"eos_token_id": end_token_ids(metadata)}
    for name, key in _RECOMMENDED.items():
        value = metadata.number(f"general.sampling.{key}")
        if value is not None:
            settings[name] = int(value) if name == "top_k" else value
    return settings


_RECOMMENDED = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def _feed_forward(metadata: Metadata) -> int:
    expert = metadata.integer(metadata.own("expert_feed_forward_length"))
    return (
        expert if metadata.architecture == "gpt-oss" and expert else metadata.need(metadata.own("feed_forward_length"))
    )


def _dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Of matrices that are all stored alike, theirs; quantized files have none of their own."""
    held = {tensor.type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(held), "bfloat16")


def _rope_scaling(model: GGUFModel, settings: Settings) -> Settings:
    """The rotary settings in transformers' words; {} for plain ones. A tensor of factors stands for Llama 3.1's scaling
    too: LongRoPE with one list of factors and no change of amplitude is the same arithmetic."""
    metadata, own = model.metadata, model.metadata.own
    factor, original = (
        metadata.number(own("rope.scaling.factor")),
        metadata.integer(own("rope.scaling.original_context_length")),
    )
    if "rope_freqs.weight" in model.tensors:
        factors = _factors(model.tensors["rope_freqs.weight"])
        return {
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
            "attention_factor": 1.0, "original_max_position_embeddings": settings["max_position_embeddings"],
        }  # fmt: skip
    if "rope_factors_long.weight" in model.tensors and "rope_factors_short.weight" in model.tensors:
        scaling: Settings = {
            "rope_type": "longrope",
            "long_factor": _factors(model.tensors["rope_factors_long.weight"]),
            "short_factor": _factors(model.tensors["rope_factors_short.weight"]),
            "original_max_position_embeddings": original or settings["max_position_embeddings"],
        }
        amplitude = metadata.number(own("rope.scaling.attn_factor"))
        return scaling if amplitude is None else {**scaling, "attention_factor": amplitude}
    kind = metadata.text(own("rope.scaling.type")) or "none"
    if kind == "none" or factor in (None, 0.0, 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        if original:
            scaling["original_max_position_embeddings"] = original
        if metadata.architecture == "gpt-oss":
            scaling["truncate"] = False
        return scaling
    raise ConfigError(f"{metadata.path} scales its rotary embedding by {kind!r}; linear, yarn and factors are known")


def _factors(tensor: StoredTensor) -> list[float]:
    if tensor.type.name != "F32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{tensor.source} is {tensor.type.name} {list(tensor.shape)}, expected a list in F32")
    fd = os.open(tensor.path, os.O_RDONLY)
    try:
        values = array("f")
        values.frombytes(os.pread(fd, tensor.nbytes, tensor.offset))
    finally:
        os.close(fd)
    if any(not 0 < value < float("inf") for value in values):
        raise CheckpointError(f"{tensor.source} holds a rotary factor that is not above 0")
    return values.tolist()


def _gemma(model: GGUFModel, settings: Settings) -> Settings:
    """The scale of attention is that of a head's size, but in the 27B models, which llama.cpp knows by their layers."""
    metadata, own = model.metadata, model.metadata.own
    largest = {"gemma2": 46, "gemma3": 62}[metadata.architecture] == settings["num_hidden_layers"]
    scale = metadata.number(own("attention.scale"))
    by_head = settings["hidden_size"] // settings["num_attention_heads"] if largest else settings["head_dim"]
    given: Settings = {
        "query_pre_attn_scalar": scale**-2 if scale else by_head,
        "sliding_window": metadata.integer(own("attention.sliding_window")),
        "attn_logit_softcapping": metadata.number(own("attn_logit_softcapping")),
        "final_logit_softcapping": metadata.number(own("final_logit_softcapping")),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if metadata.architecture == "gemma3":
        given["rope_local_base_freq"] = metadata.number(own("rope.freq_base_swa")) or 10000.0
    return given


def _nothing(model: GGUFModel, settings: Settings) -> Settings:
    return {}


def _windowed(model: GGUFModel, settings: Settings) -> Settings:
    metadata = model.metadata
    return {"sliding_window": metadata.integer(metadata.own("attention.sliding_window")) or None}


def _phi3(model: GGUFModel, settings: Settings) -> Settings:
    rotated = model.metadata.integer(model.metadata.own("rope.dimension_count")) or settings["head_dim"]
    scaling = settings.get("rope_scaling", {})
    original = scaling.get("original_max_position_embeddings", settings["max_position_embeddings"])
    return {
        **_windowed(model, settings),
        "partial_rotary_factor": rotated / settings["head_dim"],
        "original_max_position_embeddings": original,
    }


def _qwen3moe(model: GGUFModel, settings: Settings) -> Settings:
    dense = [n for n in range(settings["num_hidden_layers"]) if f"blk.{n}.ffn_gate_inp.weight" not in model.tensors]
    return {
        "mlp_only_layers": dense,
        "moe_intermediate_size": model.metadata.need(model.metadata.own("expert_feed_forward_length")),
        "norm_topk_prob": True,  # llama.cpp's graph of the family does so always
    }


def _deepseek2(model: GGUFModel, settings: Settings) -> Settings:
    """Files that cut the matrix by head have the sizes of a latent's heads in key_length and value_length, and those of
    the heads themselves under other names."""
    metadata, own = model.metadata, model.metadata.own
    rotated = settings["head_dim"]
    size, value = (
        metadata.integer(own(f"attention.{each}_length_mla")) or metadata.need(own(f"attention.{each}_length"))
        for each in ("key", "value")
    )
    groups = metadata.integer(own("expert_group_count")) or 1
    given: Settings = {
        "q_lora_rank": metadata.integer(own("attention.q_lora_rank")) or None,
        "kv_lora_rank": metadata.need(own("attention.kv_lora_rank")),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": size - rotated,
        "v_head_dim": value,
        "first_k_dense_replace": metadata.integer(own("leading_dense_block_count")) or 0,
        "moe_intermediate_size": metadata.need(own("expert_feed_forward_length")),
        "n_routed_experts": settings["num_local_experts"],
        "n_shared_experts": metadata.need(own("expert_shared_count")),
        "routed_scaling_factor": metadata.number(own("expert_weights_scale")) or 1.0,
        "norm_topk_prob": bool(metadata.flag(own("expert_weights_norm"))),
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": metadata.integer(own("expert_group_used_count")) or 1,
    }
    # A tenth of mscale_all_dim, and published models have mscale equal to that.
    weight = metadata.number(own("rope.scaling.yarn_log_multiplier"))
    if weight and "rope_scaling" in settings:
        given["rope_scaling"] = {**settings["rope_scaling"], "mscale": 10 * weight, "mscale_all_dim": 10 * weight}
    return given


def _starcoder2(model: GGUFModel, settings: Settings) -> Settings:
    """Windows are not in the file, and llama.cpp has none."""
    epsilon = model.metadata.number(model.metadata.own("attention.layer_norm_epsilon"))
    return {"rms_norm_eps": epsilon or 1e-5, "use_bias": settings["mlp_bias"], "sliding_window": None}


def _granite(model: GGUFModel, settings: Settings) -> Settings:
    metadata, own = model.metadata, model.metadata.own
    given = {
        "attention_multiplier": metadata.number(own("attention.scale")) or settings["head_dim"] ** -0.5,
        "embedding_multiplier": metadata.number(own("embedding_scale")),
        "residual_multiplier": metadata.number(own("residual_scale")),
        "logits_scaling": metadata.number(own("logit_scale")),
    }
    return {name: value for name, value in given.items() if value}


_OF_FAMILY: dict[str, Callable[[GGUFModel, Settings], Settings]] = {
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi3,
    "qwen3moe": _qwen3moe,
    "granite": _granite,
    "deepseek2": _deepseek2,
    "starcoder2": _starcoder2,
    "gpt-oss": _windowed,
}
"""By general.architecture: what a family has beside what all have."""
