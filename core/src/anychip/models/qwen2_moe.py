"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with a mixture of experts, beside one that a gate weights for every token
(config.json: Qwen2MoeForCausalLM)."""

from __future__ import annotations

from typing import Any

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.layers.stacked_experts import experts_as_stored
from anychip.model_config import ModelConfig
from anychip.models.config_kinds import given_layer_types
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.models.qwen2 import Qwen2
from anychip.plugin_api import AttentionSpec, Rope


class Qwen2MoE(Qwen2):
    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        given = given_layer_types(config)
        if not config.get("use_sliding_window"):
            if "sliding_attention" in (given or ()):  # transformers' class gives such layers a window of nothing
                raise Unsupported(config.architecture, ["layer_types sliding_attention without use_sliding_window"])
            return ["full_attention"] * config.num_layers
        before = int(config.get("max_window_layers", 28))
        return given or [
            "full_attention" if index % 2 or index >= before else "sliding_attention"
            for index in range(config.num_layers)
        ]

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        bias = bool(self.config.get("qkv_bias", True))
        attention = self.self_attention(builder, index, spec, rope, bias=bias, output_bias=False)
        return PreNormLayer(builder, self.config, index, attention, feed_forward(self, builder, index))


def feed_forward(family: Decoder, builder: Builder, index: int) -> GatedMLP | SparseMoE:
    """A block, or experts beside one that every token goes through as far as its gate says."""
    if not is_sparse(family.config, index):
        return family.gated_mlp(builder, index)
    shared = GatedMLP(
        builder,
        name=f"model.layers.{index}.mlp.shared_expert",
        hidden_size=family.config.hidden_size,
        intermediate_size=int(family.config.need("shared_expert_intermediate_size")),
        activation=family.activation,
    )
    count = int(family.config.need("num_experts"))
    return experts(family, builder, index, count, shared=shared, shared_gate="shared_expert_gate")


def is_sparse(config: ModelConfig, index: int) -> bool:
    """Whether a layer of a Qwen has experts."""
    sparse_step = int(config.get("decoder_sparse_step", 1))
    return index not in (config.get("mlp_only_layers") or []) and (index + 1) % sparse_step == 0


def experts(family: Decoder, builder: Builder, index: int, count: int, **differences: Any) -> SparseMoE:
    """A Qwen's `count` experts, with a family's differences in layers.moe.SparseMoE's arguments."""
    config, size = family.config, int(family.config.need("moe_intermediate_size"))
    spec = family.experts_spec(
        builder,
        num_experts=count,
        top_k=int(config.need("num_experts_per_tok")),
        intermediate_size=size,
        renormalize=bool(config.get("norm_topk_prob", False)),
    )
    name = f"model.layers.{index}.mlp"
    made = experts_as_stored(builder, name)
    return made(builder, name=name, spec=spec, intermediate_size=size, **differences)
