"""Qwen3: Llama's form with an RMS norm on each head's queries and keys (config.json: Qwen3ForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.models.decoder import PreNormLayer
from anychip.models.qwen2 import Qwen2
from anychip.plugin_api import AttentionSpec, Rope


class Qwen3(Qwen2):
    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        bias = bool(self.config.get("attention_bias", False))
        attention = self.self_attention(builder, index, spec, rope, bias=bias, qk_norm_eps=self.config.norm_eps)
        return PreNormLayer(builder, self.config, index, attention, self.feed_forward(builder, index))

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        return self.gated_mlp(builder, index)
