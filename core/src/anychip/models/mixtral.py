"""Mixtral: Mistral with a mixture of experts in every layer (config.json: MixtralForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.mlp import SparseMoE
from anychip.models.decoder import PreNormLayer
from anychip.models.mistral import Mistral
from anychip.plugin_api import AttentionSpec, MoESpec, Rope


class Mixtral(Mistral):
    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        config = self.config
        moe = MoESpec(
            num_experts=int(config.need("num_local_experts")),
            top_k=int(config.need("num_experts_per_tok")),
            hidden_size=config.hidden_size,
            intermediate_size=builder.split(config.intermediate_size, "expert features").count,
            dtype=builder.dtype,
            activation=self.activation,
        )
        experts = SparseMoE(
            builder,
            name=f"model.layers.{index}.block_sparse_moe",
            spec=moe,
            intermediate_size=config.intermediate_size,
            names=("w1", "w3", "w2"),
        )
        return PreNormLayer(builder, config, index, self.self_attention(builder, index, spec, rope), experts)
