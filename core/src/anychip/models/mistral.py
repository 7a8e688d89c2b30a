"""Mistral: Llama without biases, with one window for every layer; Ministral, whose layer_types name the windowed ones
(config.json: MistralForCausalLM, MinistralForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.model_config import ModelConfig
from anychip.models.config_kinds import given_layer_types
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope


class Mistral(Decoder):
    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        kind = "full_attention" if config.get("sliding_window") is None else "sliding_attention"
        return [kind] * config.num_layers

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        attention = self.self_attention(builder, index, spec, rope)
        return PreNormLayer(builder, self.config, index, attention, self.gated_mlp(builder, index))


class Ministral(Mistral):
    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        return given_layer_types(config) or super().layer_types(config)
