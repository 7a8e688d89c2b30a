"""Qwen3: Llama's form with an RMS norm on each head's queries and keys (config.json: Qwen3ForCausalLM)."""

from __future__ import annotations

from anychip.errors import Unsupported
from anychip.layers.attention import Attention
from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP, SparseMoE
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope


class Qwen3(Decoder):
    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        config, name = self.config, f"model.layers.{index}"
        if config.get("use_sliding_window"):
            raise Unsupported("Qwen3", ["use_sliding_window: true; no published checkpoint sets it"])
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
            qk_norm_eps=config.norm_eps,
        )
        return PreNormLayer(builder, config, index, attention, self.feed_forward(builder, index))

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        return GatedMLP(
            builder,
            name=f"model.layers.{index}.mlp",
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            activation="silu",
        )
