"""What config.json says of layers that a checkpoint has behind those that it describes: they predict further tokens
(MTP). Reads no tensor.

DeepSeek-V3: arXiv 2412.19437, section 2.2. GLM-4.5: arXiv 2508.06471.
"""

from __future__ import annotations

from typing import Any

import msgspec

from anychip.errors import ConfigError
from anychip.family_defaults import base_architecture
from anychip.head_config import HeadConfig
from anychip.model_config import ModelConfig
from anychip.plugin_api import FINAL

SERVED = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "Glm4MoeForCausalLM", "GlmMoeDsaForCausalLM")
"""Families whose checkpoints have DeepSeek V3's module: a layer of their own kind, behind a projection of two norms."""

_NUM_LAYERS = "num_nextn_predict_layers"
_KEYS = (_NUM_LAYERS, "mtp_num_hidden_layers", "num_mtp_modules")
"""Keys of config.json with the number of layers that predict tokens beyond the next one."""

_WITH_STATES = ("Qwen3NextForCausalLM",)
"""Families whose checkpoints have such layers without a word in config.json, and whose other layers keep states."""

_BY_LAYER = {"mlp_layer_types": "sparse", "indexer_types": "full"}
"""Keys of config.json with an entry for each layer, and what such a layer is."""


def load_mtp_config(target: ModelConfig, others: str = "") -> HeadConfig:
    """The first of the target's own heads. `others` says what --speculate takes besides. Raises ConfigError, which says
    what the model has."""
    count = int(target.get(_NUM_LAYERS) or 0)
    if base_architecture(target.architecture) not in SERVED or count < 1:
        raise _refusal(target, others)
    return HeadConfig(
        kind="MTP",
        model=msgspec.structs.replace(
            target,
            num_layers=target.num_layers + count,
            tie_word_embeddings=False,  # it has neither of the two: it borrows them
            raw=_described(target, count),
        ),
        taps=(FINAL,),
        num_draft_tokens=target.vocab_size,
        layer=target.num_layers,
    )


def _described(target: ModelConfig, count: int) -> dict[str, Any]:
    """config.json as if it described the further layers too."""
    raw = dict(target.raw)
    if target.get("index_topk") is not None:
        raw["indexer_types"] = ["full"] * target.num_layers  # of the target's own layers none is built
    for key, kind in _BY_LAYER.items():
        if raw.get(key):
            raw[key] = [*raw[key][: target.num_layers], *[kind] * count]
    return raw


def _refusal(target: ModelConfig, others: str) -> ConfigError:
    found = {key: target.get(key) for key in _KEYS if target.get(key)}
    has = ", ".join(f"{key} {value}" for key, value in found.items())
    if target.architecture in _WITH_STATES:
        return ConfigError(
            f"--speculate mtp: checkpoints of {target.architecture} have such heads, and its other layers keep states, "
            f"which cannot give a rejected token back: nothing drafts for {target.folder}; leave --speculate out"
        )
    if has:
        return ConfigError(
            f"--speculate mtp is not implemented for {target.architecture}: {target.folder} has such heads ({has}), "
            f"and those of {', '.join(SERVED)} alone are read; {others}"
        )
    return ConfigError(
        f"--speculate mtp needs a model with heads that predict several tokens; {target.architecture} of "
        f"{target.folder} has {target.num_layers} layers and none of them ({', '.join(_KEYS)}); {others}"
    )
