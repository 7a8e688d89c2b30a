"""Granite 3: Llama with multipliers on embeddings, attention, residual sums and logits
(config.json: GraniteForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.model_config import ModelConfig
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, CacheSpec, ForwardContext, Rope, StepAdapters


class Granite(Decoder):
    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[CacheSpec]) -> None:
        self.embedding_scale = float(config.get("embedding_multiplier", 1.0))
        self.logits_scaling = float(config.get("logits_scaling", 1.0))
        super().__init__(config, builder, specs)

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> GraniteLayer:
        config = self.config
        bias, scale = bool(config.get("attention_bias", False)), float(config.get("attention_multiplier", 1.0))
        attention = self.self_attention(builder, index, spec, rope, scale=scale, bias=bias)
        layer = GraniteLayer(builder, config, index, attention, self.feed_forward(builder, index))
        layer.multiplier = float(config.get("residual_multiplier", 1.0))
        return layer

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        return self.gated_mlp(builder, index, bias=bool(self.config.get("mlp_bias", False)))

    def logits(self, hidden: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        return super().logits(hidden, adapters) / self.logits_scaling


class GraniteLayer(PreNormLayer):
    multiplier = 1.0

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm.with_residual(hidden, residual, self.attention.accepts)
        hidden = self.attention(hidden, context) * self.multiplier
        hidden, residual = self.mlp_norm.with_residual(hidden, residual, self.mlp.accepts)
        return self.mlp(hidden, context) * self.multiplier, residual
