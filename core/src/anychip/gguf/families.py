"""llama.cpp's families that a family here serves, and what each calls its tensors: theirs, ours.

Sources: llama.cpp's convert_hf_to_gguf.py and gguf-py's tensor_mapping.py, which say how a checkpoint's tensors
became a file's: queries and keys of Llama's kind have their rows in pairs, since llama.cpp turns neighbours where the
checkpoint turns halves; Gemma's norms have 1 added.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from anychip.gguf.header import StoredTensor

_BLOCK = re.compile(r"blk\.(\d+)\.(.+?)(?:\.(weight|bias))?")

_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_KEYS_AND_VALUES = "self_attn.kv_b_proj"
_WHOLE = ("attn_sinks", "exp_probs_b")
"""Parts whose names in a checkpoint have no end."""
_SANDWICHED = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
}
_SETTINGS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that config.py reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """`module` of a layer holds them; `names` are those of an expert's gate, up and down matrices."""

    module: str
    router: str
    names: tuple[str, str, str]
    joined_biases: bool = False
    """Whether they have biases, gate's and up's in turns in one tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    architecture: str
    """In config.json."""
    modules: Mapping[str, str] = field(default_factory=lambda: _COMMON)
    paired_rows: bool = False
    unit_offset_norms: bool = False
    experts: Experts | None = None
    latent: bool = False
    """Whether keys and values come from a latent, by a matrix that newer files cut by head."""


_LLAMA = Family(architecture="LlamaForCausalLM", paired_rows=True)
_GEMMA2 = Family(architecture="Gemma2ForCausalLM", modules={**_COMMON, **_SANDWICHED}, unit_offset_norms=True)

_LATENT = {
    **_COMMON,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": _KEYS_AND_VALUES,
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
}
DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    modules=_LATENT,
    experts=Experts(module="mlp.experts", router="mlp.gate", names=("gate_proj", "up_proj", "down_proj")),
    latent=True,
)
DEEPSEEK_V3 = replace(DEEPSEEK_V2, architecture="DeepseekV3ForCausalLM")
"""Of deepseek2 whose experts are scored by sigmoid."""

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "qwen2": Family(architecture="Qwen2ForCausalLM"),
    "qwen3": Family(architecture="Qwen3ForCausalLM"),
    "qwen3moe": Family(
        architecture="Qwen3MoeForCausalLM",
        experts=Experts(module="mlp.experts", router="mlp.gate", names=("gate_proj", "up_proj", "down_proj")),
    ),
    "gemma2": _GEMMA2,
    "gemma3": replace(_GEMMA2, architecture="Gemma3ForCausalLM"),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        modules={**_COMMON, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "granite": replace(_LLAMA, architecture="GraniteForCausalLM"),
    "gpt-oss": Family(
        architecture="GptOssForCausalLM",
        modules={**_COMMON, "post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks"},
        experts=Experts(module="mlp.experts", router="mlp.router", names=("gate", "up", "down"), joined_biases=True),
    ),
    "deepseek2": DEEPSEEK_V2,
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        modules={**_COMMON, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
}
"""By general.architecture."""

MIXTRAL = replace(
    _LLAMA,
    architecture="MixtralForCausalLM",
    experts=Experts(module="block_sparse_moe.experts", router="block_sparse_moe.gate", names=("w1", "w3", "w2")),
)
"""Of llama with experts."""

_STACKS = {"ffn_gate_exps": 0, "ffn_up_exps": 1, "ffn_down_exps": 2}


@dataclass(frozen=True, slots=True)
class Placed:
    """What a checkpoint of the family calls a tensor, or one expert's part of it. `name` ends as the checkpoint's does,
    in .weight or .bias where it has such an end."""

    name: str
    tensor: StoredTensor
    expert: int | None = None
    paired_rows: bool = False
    unit_offset: bool = False


@dataclass(frozen=True, slots=True)
class PlacedTogether:
    """Tensors of which rows take turns in the checkpoint's: gate's and up's biases, [num_experts, features] each."""

    name: str
    tensors: tuple[StoredTensor, StoredTensor]


@dataclass(frozen=True, slots=True)
class PlacedByHead:
    """Keys' and values' parts of the matrix that makes both of a latent: [heads, latent, features], of which the file
    has rows and columns changed, and [heads, features, latent]. The checkpoint's has a head's keys above its values."""

    name: str
    tensors: tuple[StoredTensor, StoredTensor]


AnyPlaced = Placed | PlacedTogether | PlacedByHead


def placed(family: Family, tensors: Mapping[str, StoredTensor]) -> Iterator[AnyPlaced]:
    """Every tensor of a file under its name in a checkpoint. A tensor that the family does not know keeps its own:
    loading refuses it by that."""
    for name, tensor in tensors.items():
        if name in _SETTINGS:
            continue
        if name in _OUTSIDE:
            yield Placed(_OUTSIDE[name], tensor, unit_offset=family.unit_offset_norms and "norm" in name)
            continue
        match = _BLOCK.fullmatch(name)
        if match is None:
            yield Placed(name, tensor)
            continue
        yield from _in_layer(family, tensors, tensor, match)


def _in_layer(
    family: Family, tensors: Mapping[str, StoredTensor], tensor: StoredTensor, match: re.Match[str]
) -> Iterator[AnyPlaced]:
    layer, part, end = f"model.layers.{match[1]}", match[2], f".{match[3]}" if match[3] else ""
    experts = family.experts
    if experts is not None and part in _STACKS:
        if match[3] == "bias" and experts.joined_biases:
            yield from _biases(f"{layer}.{experts.module}", f"blk.{match[1]}", part, tensors, tensor)
            return
        name = experts.names[_STACKS[part]]
        for expert in range(tensor.shape[0] if len(tensor.shape) == 3 else 0):
            yield Placed(f"{layer}.{experts.module}.{expert}.{name}{end}", tensor, expert=expert)
        return
    if experts is not None and part == "ffn_gate_inp":
        yield Placed(f"{layer}.{experts.router}{end}", tensor)
        return
    if family.latent and part in ("attn_k_b", "attn_v_b"):
        keys, values = (tensors.get(f"blk.{match[1]}.{each}.weight") for each in ("attn_k_b", "attn_v_b"))
        if keys is None or values is None:
            yield Placed(tensor.name, tensor)
        elif tensor is keys:
            yield PlacedByHead(f"{layer}.{_KEYS_AND_VALUES}.weight", (keys, values))
        return
    module = family.modules.get(part)
    if module is None:
        yield Placed(tensor.name, tensor)
        return
    if part in _WHOLE:
        end = ""
    yield Placed(
        f"{layer}.{module}{end}",
        tensor,
        paired_rows=family.paired_rows and part in ("attn_q", "attn_k"),
        unit_offset=family.unit_offset_norms and part.endswith("norm"),
    )


def _biases(
    module: str, block: str, part: str, tensors: Mapping[str, StoredTensor], tensor: StoredTensor
) -> Iterator[Placed | PlacedTogether]:
    if part == "ffn_down_exps":
        yield Placed(f"{module}.down_proj_bias", tensor)
    elif part == "ffn_gate_exps" and (up := tensors.get(f"{block}.ffn_up_exps.bias")) is not None:
        yield PlacedTogether(f"{module}.gate_up_proj_bias", (tensor, up))
