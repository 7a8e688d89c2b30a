"""Phi-3 and Phi-4: Llama whose checkpoint fuses queries, keys and values, and gate and up; LongRoPE
(config.json: Phi3ForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.models.decoder import PreNormLayer
from anychip.models.mistral import Mistral
from anychip.plugin_api import AttentionSpec, Rope


class Phi3(Mistral):
    partial_rotary = True

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        attention = self.self_attention(builder, index, spec, rope, fused_qkv="qkv_proj")
        mlp = self.gated_mlp(builder, index, fused_gate_up="gate_up_proj")
        return PreNormLayer(builder, self.config, index, attention, mlp)
