"""Llama 2 and 3.x, and what shares their form (config.json: LlamaForCausalLM)."""

from __future__ import annotations

from anychip.layers.attention import Attention
from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope


class Llama(Decoder):
    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        config, name = self.config, f"model.layers.{index}"
        attention = Attention(
            builder,
            name=f"{name}.self_attn",
            index=index,
            spec=spec,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            scale=config.head_dim**-0.5,
            rope=rope,
            bias=bool(config.get("attention_bias", False)),
        )
        mlp = GatedMLP(
            builder,
            name=f"{name}.mlp",
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            activation="silu",
            bias=bool(config.get("mlp_bias", False)),
        )
        return PreNormLayer(builder, config, index, attention, mlp)
