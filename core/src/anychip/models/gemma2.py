"""Gemma 2: softcapped attention, windows on every other layer, norms on both sides of each block
(config.json: Gemma2ForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP
from anychip.layers.norm import RMSNorm
from anychip.model_config import ModelConfig
from anychip.models.config_kinds import given_layer_types
from anychip.models.decoder import Decoder
from anychip.plugin_api import AttentionSpec, ForwardContext, Rope


class Gemma2(Decoder):
    activation_field = ("hidden_activation", "gelu_pytorch_tanh")
    attention_softcap = True
    unit_offset_norm = True
    sees_all = False
    """Whether a token sees those behind it."""

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[AttentionSpec]) -> None:
        both = bool(config.get("use_bidirectional_attention"))
        if both is not self.sees_all:
            kind = "an encoder" if self.sees_all else "a decoder"
            raise Unsupported(config.architecture, [f"use_bidirectional_attention {str(both).lower()}; this is {kind}"])
        self.embedding_scale = config.hidden_size**0.5
        self.final_softcap = config.get("final_logit_softcapping")
        super().__init__(config, builder, specs)

    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        return given_layer_types(config) or [
            "full_attention" if index % 2 else "sliding_attention" for index in range(config.num_layers)
        ]

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> SandwichLayer:
        scale = float(self.config.get("query_pre_attn_scalar", self.config.head_dim)) ** -0.5
        bias = bool(self.config.get("attention_bias", False))
        attention = self.self_attention(builder, index, spec, rope, scale=scale, bias=bias)
        mlp = self.gated_mlp(builder, index)
        return SandwichLayer(builder, self.config, index, attention, mlp)


class SandwichLayer:
    """The residual is summed after the second norm of each block, so it cannot fuse with the first one's input.
    `attention` is layers.attention.Attention, or an encoder's that is called as it is."""

    def __init__(self, builder: Builder, config: ModelConfig, index: int, attention: Any, mlp: GatedMLP) -> None:
        self.attention, self.mlp = attention, mlp

        def norm(which: str) -> RMSNorm:
            return RMSNorm(
                builder,
                name=f"model.layers.{index}.{which}",
                size=config.hidden_size,
                eps=config.norm_eps,
                unit_offset=True,
            )

        self.before_attention = norm("input_layernorm")
        self.after_attention = norm("post_attention_layernorm")
        self.before_mlp = norm("pre_feedforward_layernorm")
        self.after_mlp = norm("post_feedforward_layernorm")

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.before_attention.with_residual(hidden, residual, self.attention.accepts)
        hidden = self.after_attention(self.attention(hidden, context))
        hidden, residual = self.before_mlp.with_residual(hidden, residual, self.mlp.accepts)
        return self.after_mlp(self.mlp(hidden, context)), residual
