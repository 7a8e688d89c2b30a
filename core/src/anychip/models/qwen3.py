"""Qwen3: Llama's form with an RMS norm on each head's queries and keys (config.json: Qwen3ForCausalLM)."""

from __future__ import annotations

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP, SparseMoE
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope


class Qwen3(Decoder):
    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        if self.config.get("use_sliding_window"):
            raise Unsupported("Qwen3", ["use_sliding_window: true; no published checkpoint sets it"])
        attention = self.self_attention(builder, index, spec, rope, qk_norm_eps=self.config.norm_eps)
        return PreNormLayer(builder, self.config, index, attention, self.feed_forward(builder, index))

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        return self.gated_mlp(builder, index)
