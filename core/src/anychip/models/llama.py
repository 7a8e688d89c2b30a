"""Llama 2 and 3.x, and what shares their form (config.json: LlamaForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope


class Llama(Decoder):
    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        bias = bool(self.config.get("attention_bias", False))
        attention = self.self_attention(builder, index, spec, rope, bias=bias)
        mlp = self.gated_mlp(builder, index, bias=bool(self.config.get("mlp_bias", False)))
        return PreNormLayer(builder, self.config, index, attention, mlp)
