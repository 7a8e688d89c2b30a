"""LFM2: short convolutions with a few layers of attention between them, dense and with a mixture of experts
(config.json: Lfm2ForCausalLM, Lfm2MoeForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from anychip.layers.build import Builder
from anychip.layers.causal_conv import conv_spec
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.layers.short_conv import ShortConv
from anychip.model_config import ModelConfig
from anychip.models.hybrid import ATTENTION, STATE, BlockLayer, Hybrid, Mixer, known_kinds
from anychip.plugin_api import MeshShape, Rope, Sharded, StateSpec
from anychip.types import DType

_MATRICES = ("w1", "w3", "w2")
"""Gate, up and down."""


class Lfm2(Hybrid):
    renamed = MappingProxyType({"model.embedding_norm.": "model.norm."})

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        if config.get("layer_types") is not None:
            return known_kinds(config, "layer_types", {"conv": STATE})
        every = range(config.num_layers)
        attention = config.get("full_attn_idxs")
        return [ATTENTION if index in (every if attention is None else attention) else STATE for index in every]

    @classmethod
    def state_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType) -> list[StateSpec]:
        channels = Sharded(dim=0).count(config.hidden_size, shape, "channels")
        return [conv_spec(channels, int(config.need("conv_L_cache")), dtype)]

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> BlockLayer:
        config, name = self.config, f"model.layers.{index}"
        mixer: Mixer
        if kind == ATTENTION:
            mixer = self.self_attention(
                builder,
                index,
                specs[at],
                rope,
                at=at,
                qk_norm_eps=config.norm_eps,
                names={"output": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"},
            )
        else:
            mixer = ShortConv(
                builder,
                name=f"{name}.conv",
                index=at,
                spec=specs[at],
                hidden_size=config.hidden_size,
                bias=bool(config.get("conv_bias", False)),
            )
        blocks = {"ffn_norm": self.feed_forward(builder, index)}
        return BlockLayer(builder, config, name, mixer=("operator_norm", mixer), blocks=blocks)

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        return self.dense(builder, index, self.dense_size())

    def dense_size(self) -> int:
        config, size = self.config, int(self.config.get("block_ff_dim") or self.config.intermediate_size)
        if config.get("block_auto_adjust_ff_dim", True):
            size = int(2 * size / 3)
            if config.get("block_ffn_dim_multiplier", 1.0) is not None:
                size = int(config.get("block_ffn_dim_multiplier", 1.0) * size)
                multiple = int(config.get("block_multiple_of", 256))
                size = -(-size // multiple) * multiple
        return size

    def dense(self, builder: Builder, index: int, size: int) -> GatedMLP:
        return GatedMLP(
            builder,
            name=f"model.layers.{index}.feed_forward",
            hidden_size=self.config.hidden_size,
            intermediate_size=size,
            activation="silu",
            names=_MATRICES,
        )


class Lfm2MoE(Lfm2):
    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        config = self.config
        if index < int(config.need("num_dense_layers")):
            return self.dense(builder, index, config.intermediate_size)
        size, corrected = int(config.need("moe_intermediate_size")), bool(config.get("use_expert_bias", True))
        spec = self.experts_spec(
            builder,
            num_experts=int(config.need("num_experts")),
            top_k=int(config.need("num_experts_per_tok")),
            intermediate_size=size,
            scoring="sigmoid",
            router_bias=corrected,
            renormalize=bool(config.get("norm_topk_prob", True)),
            router_scale=float(config.get("routed_scaling_factor", 1.0)),
        )
        return SparseMoE(
            builder,
            name=f"model.layers.{index}.feed_forward",
            spec=spec,
            intermediate_size=size,
            names=_MATRICES,
            correction="expert_bias",
        )
