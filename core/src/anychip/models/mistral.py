"""Mistral and Ministral: Llama with a window on every layer, or on those that layer_types names
(config.json: MistralForCausalLM, MinistralForCausalLM)."""

from __future__ import annotations

from anychip.model_config import ModelConfig
from anychip.models.llama import Llama


class Mistral(Llama):
    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        kind = "full_attention" if config.get("sliding_window") is None else "sliding_attention"
        return config.get("layer_types") or [kind] * config.num_layers
