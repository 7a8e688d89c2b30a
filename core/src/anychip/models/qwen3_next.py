"""Qwen3-Next: three gated delta nets for each layer of gated attention, and experts of which one is shared
(config.json: Qwen3NextForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anychip.layers.build import Builder
from anychip.layers.gated_delta_net import DeltaNetByHead, DeltaSizes, GatedDeltaNet
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.model_config import ModelConfig
from anychip.models.hybrid import ATTENTION, STATE, BlockLayer, Hybrid, Mixer, known_kinds, need_silu
from anychip.models.qwen2_moe import feed_forward
from anychip.plugin_api import Rope


class Qwen3Next(Hybrid):
    partial_rotary = True
    unit_offset_norm = True
    delta_net: type[GatedDeltaNet] = DeltaNetByHead

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[Any]) -> None:
        builder.weights.elsewhere += ("mtp.",)  # layers that predict further tokens: config.json does not describe them
        super().__init__(config, builder, specs)

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        if config.get("layer_types") is not None:
            return known_kinds(config, "layer_types")
        every = int(config.get("full_attention_interval", 4))
        return [STATE if (index + 1) % every else ATTENTION for index in range(config.num_layers)]

    @classmethod
    def sizes(cls, config: ModelConfig) -> DeltaSizes:
        return DeltaSizes(
            key_heads=int(config.need("linear_num_key_heads")),
            value_heads=int(config.need("linear_num_value_heads")),
            key_dim=int(config.need("linear_key_head_dim")),
            value_dim=int(config.need("linear_value_head_dim")),
            width=int(config.need("linear_conv_kernel_dim")),
        )

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> BlockLayer:
        config, name = self.config, f"model.layers.{index}"
        need_silu(config)
        mixer: Mixer
        if kind == ATTENTION:
            mixer = self.self_attention(
                builder,
                index,
                specs[at],
                rope,
                at=at,
                bias=bool(config.get("attention_bias", False)),
                qk_norm_eps=config.norm_eps,
                qk_norm_unit_offset=True,
                gated=True,
            )
        else:
            mixer = self.delta_net(
                builder,
                name=f"{name}.linear_attn",
                index=at,
                specs=specs[at : at + 2],
                sizes=self.sizes(config),
                hidden_size=config.hidden_size,
                eps=config.norm_eps,
            )
        blocks = {"post_attention_layernorm": self.feed_forward(builder, index)}
        return BlockLayer(builder, config, name, mixer=("input_layernorm", mixer), blocks=blocks, unit_offset=True)

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        return feed_forward(self, builder, index)
