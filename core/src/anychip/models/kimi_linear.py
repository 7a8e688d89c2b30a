"""Kimi Linear: Kimi delta attention with a few layers of latent attention that has no positions, and DeepSeek V3's
experts (config.json: KimiLinearForCausalLM)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from anychip.layers.build import Builder
from anychip.layers.kimi_delta import KimiDeltaAttention, KimiDeltaSizes
from anychip.layers.latent import LatentAttention
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.layers.rotary import still_rope
from anychip.model_config import ModelConfig
from anychip.models.deepseek import LATENT_EPS, corrected_routing, experts, is_dense, latent_spec
from anychip.models.hybrid import ATTENTION, STATE, BlockLayer, Hybrid, Mixer, known_kinds, need_silu
from anychip.plugin_api import CacheSpec, MeshShape, Rope
from anychip.types import DType

_OF_EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class KimiLinear(Hybrid):
    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[Any]) -> None:
        builder.weights.rename = self.wanted_name
        super().__init__(config, builder, specs)

    @classmethod
    def wanted_name(cls, name: str) -> str:
        """DeepSeek's names of feed-forward blocks."""
        name = name.replace(".block_sparse_moe.", ".mlp.")
        return re.sub(r"(\.experts\.\d+\.)(w[123])\b", lambda found: found[1] + _OF_EXPERTS[found[2]], name)

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        """By layer; published models list the layers of attention, counted from 1."""
        if config.get("layer_types") is not None:
            return known_kinds(config, "layer_types")
        listed = (config.get("linear_attn_config") or {}).get("full_attn_layers")
        attention = range(4, config.num_layers, 4) if listed is None else [layer - 1 for layer in listed]
        return [ATTENTION if index in attention else STATE for index in range(config.num_layers)]

    @classmethod
    def sizes(cls, config: ModelConfig) -> KimiDeltaSizes:
        given = config.get("linear_attn_config") or {}
        return KimiDeltaSizes(
            heads=int(given.get("num_heads") or config.need("linear_num_heads")),
            head_dim=int(given.get("head_dim") or config.need("linear_head_dim")),
            width=int(given.get("short_conv_kernel_size") or config.need("linear_conv_kernel_dim")),
        )

    @classmethod
    def specs_of(
        cls, kind: str, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> Sequence[CacheSpec]:
        if kind == ATTENTION:
            return [latent_spec(config, shape, dtype, kv_dtype)]
        return cls.state_specs(config, shape, dtype)

    def rope(self, builder: Builder) -> Rope:
        return still_rope(self.config, builder.platform.default_device, int(self.config.need("qk_rope_head_dim")))

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> BlockLayer:
        name = f"model.layers.{index}"
        blocks = {"post_attention_layernorm": self.feed_forward(builder, index)}
        mixer = self.mixer(builder, f"{name}.self_attn", kind, specs, at, rope)
        return BlockLayer(builder, self.config, name, mixer=("input_layernorm", mixer), blocks=blocks)

    def mixer(self, builder: Builder, name: str, kind: str, specs: Sequence[Any], at: int, rope: Rope | None) -> Mixer:
        config = self.config
        if kind == STATE:
            need_silu(config)
            return KimiDeltaAttention(
                builder,
                name=name,
                index=at,
                specs=specs[at : at + 2],
                sizes=self.sizes(config),
                hidden_size=config.hidden_size,
                eps=config.norm_eps,
            )
        assert rope is not None, "it turns nothing, and is there"
        return LatentAttention(
            builder,
            name=name,
            index=at,
            spec=specs[at],
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            scale=(specs[at].nope_dim + specs[at].rope_dim) ** -0.5,
            rope=rope,
            query_rank=config.get("q_lora_rank"),
            norm_eps=LATENT_EPS,
            bias=bool(config.get("attention_bias", False)),
        )

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        if is_dense(self.config, index):
            return self.gated_mlp(builder, index)
        return experts(self, builder, index, **corrected_routing(self.config))
