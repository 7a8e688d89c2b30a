"""Seed-OSS: Llama with biases on queries, keys and values (config.json: SeedOssForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope


class SeedOss(Decoder):
    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        bias, output = (bool(self.config.get(f"attention_{part}bias", False)) for part in ("", "out_"))
        attention = self.self_attention(builder, index, spec, rope, bias=bias, output_bias=output)
        mlp = self.gated_mlp(builder, index, bias=bool(self.config.get("mlp_bias", False)))
        return PreNormLayer(builder, self.config, index, attention, mlp)
