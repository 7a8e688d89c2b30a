"""Jamba: Mamba layers with a few of attention, without positions, and experts in every other layer
(config.json: JambaForCausalLM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from anychip.layers.build import Builder
from anychip.layers.mamba import Mamba, MambaSizes
from anychip.layers.moe import SparseMoE
from anychip.model_config import ModelConfig
from anychip.models.hybrid import ATTENTION, STATE, BlockLayer, FeedForward, Hybrid, Mixer, need_silu
from anychip.plugin_api import Rope


class Jamba(Hybrid):
    rotates = False
    renamed = MappingProxyType({"model.final_layernorm.": "model.norm."})

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        every, first = int(config.need("attn_layer_period")), int(config.need("attn_layer_offset"))
        return [ATTENTION if index % every == first else STATE for index in range(config.num_layers)]

    @classmethod
    def sizes(cls, config: ModelConfig) -> MambaSizes:
        rank = config.get("mamba_dt_rank", "auto")
        return MambaSizes(
            channels=int(config.need("mamba_expand") * config.hidden_size),
            state_dim=int(config.need("mamba_d_state")),
            dt_rank=math.ceil(config.hidden_size / 16) if rank == "auto" else int(rank),
            width=int(config.need("mamba_d_conv")),
        )

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> BlockLayer:
        config, name = self.config, f"model.layers.{index}"
        need_silu(config)
        mixer: Mixer
        if kind == ATTENTION:
            mixer = self.self_attention(builder, index, specs[at], None, at=at)
        else:
            mixer = Mamba(
                builder,
                name=f"{name}.mamba",
                index=at,
                specs=specs[at : at + 2],
                sizes=self.sizes(config),
                hidden_size=config.hidden_size,
                bias=bool(config.get("mamba_proj_bias")),
                conv_bias=bool(config.get("mamba_conv_bias")),
                norm_eps=config.norm_eps,
            )
        blocks = {"pre_ff_layernorm": self.feed_forward(builder, index)}
        return BlockLayer(builder, config, name, mixer=("input_layernorm", mixer), blocks=blocks)

    def feed_forward(self, builder: Builder, index: int) -> FeedForward:
        config, name = self.config, f"model.layers.{index}.feed_forward"
        count = int(config.need("num_experts"))
        every, first = int(config.need("expert_layer_period")), int(config.need("expert_layer_offset"))
        if count == 1 or index % every != first:
            return self.gated_mlp(builder, index, name=name)
        spec = self.experts_spec(
            builder,
            num_experts=count,
            top_k=int(config.need("num_experts_per_tok")),
            intermediate_size=config.intermediate_size,
            renormalize=False,
        )
        return SparseMoE(builder, name=name, spec=spec, intermediate_size=config.intermediate_size, router="router")
