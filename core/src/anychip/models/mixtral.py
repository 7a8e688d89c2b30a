"""Mixtral: Mistral with a mixture of experts in every layer (config.json: MixtralForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.moe import SparseMoE
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.models.mistral import Mistral
from anychip.plugin_api import AttentionSpec, Rope


class Mixtral(Mistral):
    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        attention = self.self_attention(builder, index, spec, rope)
        return PreNormLayer(builder, self.config, index, attention, experts(self, builder, index))


def experts(family: Decoder, builder: Builder, index: int) -> SparseMoE:
    """Mixtral's, under its names."""
    config = family.config
    spec = family.experts_spec(
        builder,
        num_experts=int(config.need("num_local_experts")),
        top_k=int(config.need("num_experts_per_tok")),
        intermediate_size=config.intermediate_size,
    )
    return SparseMoE(
        builder,
        name=f"model.layers.{index}.block_sparse_moe",
        spec=spec,
        intermediate_size=config.intermediate_size,
        names=("w1", "w3", "w2"),
    )
