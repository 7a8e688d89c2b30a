"""Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values (config.json: Qwen2ForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.model_config import ModelConfig
from anychip.models.config_kinds import given_layer_types
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope


class Qwen2(Decoder):
    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        given = given_layer_types(config)
        if not config.get("use_sliding_window"):
            return ["full_attention"] * config.num_layers
        first = int(config.get("max_window_layers", 28))
        return given or [
            "sliding_attention" if index >= first else "full_attention" for index in range(config.num_layers)
        ]

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        attention = self.self_attention(builder, index, spec, rope, bias=True, output_bias=False)
        return PreNormLayer(builder, self.config, index, attention, self.gated_mlp(builder, index))
