"""Granite 3 MoE: Granite with a mixture of experts, whose matrices the checkpoint stacks by layer
(config.json: GraniteMoeForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.layers.stacked_experts import LayerOfExperts
from anychip.models.decoder import Decoder
from anychip.models.granite import Granite


class GraniteMoE(Granite):
    def feed_forward(self, builder: Builder, index: int) -> SparseMoE:
        return granite_experts(self, builder, index)


def granite_experts(family: Decoder, builder: Builder, index: int, shared: GatedMLP | None = None) -> SparseMoE:
    """Weighted by the softmax over those that are picked. `shared`: one that every token goes through."""
    config = family.config
    spec = family.experts_spec(
        builder,
        num_experts=int(config.need("num_local_experts")),
        top_k=int(config.need("num_experts_per_tok")),
        intermediate_size=config.intermediate_size,
    )
    name, size = f"model.layers.{index}.block_sparse_moe", config.intermediate_size
    return LayerOfExperts(builder, name=name, spec=spec, intermediate_size=size, router="router.layer", shared=shared)
