"""Bamba: Mamba-2 layers with a few of attention between them, each before a feed-forward block
(config.json: BambaForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from anychip.layers.attention import Attention
from anychip.layers.build import Builder
from anychip.layers.mamba2 import Mamba2, Mamba2Sizes
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.model_config import ModelConfig
from anychip.models.hybrid import ATTENTION, STATE, BlockLayer, Hybrid, Mixer, need_silu
from anychip.models.mamba2 import dt_limits
from anychip.plugin_api import Rope


class Bamba(Hybrid):
    partial_rotary = True
    renamed = MappingProxyType({"model.final_layernorm.": "model.norm."})

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        attention = config.get("attn_layer_indices") or []
        return [ATTENTION if index in attention else STATE for index in range(config.num_layers)]

    @classmethod
    def sizes(cls, config: ModelConfig) -> Mamba2Sizes:
        heads = int(config.need("mamba_n_heads"))
        inner = int(config.get("mamba_d_ssm") or config.need("mamba_expand") * config.hidden_size)
        head_dim = config.get("mamba_d_head", "auto")
        return Mamba2Sizes(
            heads=heads,
            head_dim=inner // heads if head_dim == "auto" else int(head_dim),
            state_dim=int(config.need("mamba_d_state")),
            groups=int(config.need("mamba_n_groups")),
            width=int(config.need("mamba_d_conv")),
        )

    def mamba(self, builder: Builder, index: int, specs: Sequence[Any], at: int, **differences: Any) -> Mamba2:
        """The layer's mixer of states, with a family's differences in layers.mamba2.Mamba2's arguments."""
        config = self.config
        need_silu(config)
        settings: dict[str, Any] = {"norm_eps": config.norm_eps, **differences}
        return Mamba2(
            builder,
            name=f"model.layers.{index}.mamba",
            index=at,
            specs=specs[at : at + 2],
            sizes=self.sizes(config),
            hidden_size=config.hidden_size,
            bias=bool(config.get("mamba_proj_bias")),
            conv_bias=bool(config.get("mamba_conv_bias")),
            dt_limits=dt_limits(config),
            **settings,
        )

    def attend(self, builder: Builder, index: int, specs: Sequence[Any], at: int, rope: Rope | None) -> Attention:
        bias = bool(self.config.get("attention_bias", False))
        return self.self_attention(builder, index, specs[at], rope, at=at, bias=bias)

    def mixer(self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None) -> Mixer:
        if kind == ATTENTION:
            return self.attend(builder, index, specs, at, rope)
        return self.mamba(builder, index, specs, at)

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        bias = bool(self.config.get("mlp_bias", False))
        return self.gated_mlp(builder, index, name=f"model.layers.{index}.feed_forward", bias=bias)

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> BlockLayer:
        return BlockLayer(
            builder,
            self.config,
            f"model.layers.{index}",
            mixer=("input_layernorm", self.mixer(builder, index, kind, specs, at, rope)),
            blocks={"pre_ff_layernorm": self.feed_forward(builder, index)},
        )
