"""MiniMax-M2: a share of each head rotated, a norm over the queries and over the keys of all heads, and experts that
are picked by corrected sigmoids (config.json: MiniMaxM2ForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.moe import SparseMoE
from anychip.layers.rotary import make_rope
from anychip.model_config import rope_parameters
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope


class MiniMaxM2(Decoder):
    def rope(self, builder: Builder) -> Rope:
        """Published models say how many dimensions of a head are rotated; others give the share."""
        parameters = rope_parameters(self.config)
        if "partial_rotary_factor" not in parameters and self.config.get("rotary_dim") is not None:
            share = int(self.config.need("rotary_dim")) / self.config.head_dim
            parameters = {**parameters, "partial_rotary_factor": share}
        return make_rope(self.config, parameters, builder.platform.default_device, partial=True)

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        config = self.config
        moe = self.experts_spec(
            builder,
            num_experts=int(config.get("num_experts") or config.need("num_local_experts")),
            top_k=int(config.need("num_experts_per_tok")),
            intermediate_size=config.intermediate_size,
            scoring="sigmoid",
            router_bias=True,
        )
        experts = SparseMoE(
            builder,
            name=f"model.layers.{index}.block_sparse_moe",
            spec=moe,
            intermediate_size=config.intermediate_size,
            names=("w1", "w3", "w2"),
            correction="e_score_correction_bias",
        )
        attention = self.self_attention(builder, index, spec, rope, wide_qk_norm_eps=config.norm_eps)
        return PreNormLayer(builder, config, index, attention, experts)
