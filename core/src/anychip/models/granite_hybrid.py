"""Granite 4 hybrid: Mamba-2 layers with a few of attention, without positions where config.json gives none, experts
beside a shared block in the larger models, and Granite's multipliers (config.json: GraniteMoeHybridForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anychip.layers.attention import Attention
from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.model_config import ModelConfig
from anychip.models.bamba import Bamba
from anychip.models.granite_moe import granite_experts
from anychip.models.hybrid import STATE, BlockLayer, known_kinds
from anychip.plugin_api import Rope, StepAdapters


class GraniteHybrid(Bamba):
    partial_rotary = False

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[Any]) -> None:
        self.embedding_scale = float(config.get("embedding_multiplier", 1.0))
        self.logits_scaling = float(config.get("logits_scaling", 1.0))
        super().__init__(config, builder, specs)

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        for field in ("layer_types", "layers_block_type"):
            if config.get(field) is not None:
                return known_kinds(config, field)
        return [STATE] * config.num_layers

    def rope(self, builder: Builder) -> Rope | None:
        return super().rope(builder) if self.config.get("position_embedding_type") == "rope" else None

    def attend(self, builder: Builder, index: int, specs: Sequence[Any], at: int, rope: Rope | None) -> Attention:
        config = self.config
        bias, scale = bool(config.get("attention_bias", False)), float(config.get("attention_multiplier", 1.0))
        return self.self_attention(builder, index, specs[at], rope, at=at, bias=bias, scale=scale)

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        """A block that every token goes through, beside experts where there are some."""
        shared = GatedMLP(
            builder,
            name=f"model.layers.{index}.shared_mlp",
            hidden_size=self.config.hidden_size,
            intermediate_size=int(self.config.need("shared_intermediate_size")),
            activation=self.activation,
            fused_gate_up="input_linear",
            names=("gate_proj", "up_proj", "output_linear"),
        )
        return granite_experts(self, builder, index, shared) if self.config.get("num_local_experts") else shared

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> BlockLayer:
        return BlockLayer(
            builder,
            self.config,
            f"model.layers.{index}",
            mixer=("input_layernorm", self.mixer(builder, index, kind, specs, at, rope)),
            blocks={"post_attention_layernorm": self.feed_forward(builder, index)},
            multiplier=float(self.config.get("residual_multiplier", 1.0)),
        )

    def logits(self, hidden: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        return super().logits(hidden, adapters) / self.logits_scaling
