"""OLMoE: Llama with a norm over the queries and over the keys of all heads, and a mixture of experts in every layer
(config.json: OlmoeForCausalLM)."""

from __future__ import annotations

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.moe import SparseMoE
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope


class Olmoe(Decoder):
    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        config = self.config
        if config.get("clip_qkv") is not None:
            raise Unsupported(config.architecture, [f"clip_qkv {config.get('clip_qkv')}; published models have none"])
        bias = bool(config.get("attention_bias", False))
        attention = self.self_attention(builder, index, spec, rope, bias=bias, wide_qk_norm_eps=config.norm_eps)
        moe = self.experts_spec(
            builder,
            num_experts=int(config.get("num_local_experts") or config.need("num_experts")),
            top_k=int(config.need("num_experts_per_tok")),
            intermediate_size=config.intermediate_size,
            renormalize=bool(config.get("norm_topk_prob", False)),
        )
        name = f"model.layers.{index}.mlp"
        experts = SparseMoE(builder, name=name, spec=moe, intermediate_size=config.intermediate_size)
        return PreNormLayer(builder, config, index, attention, experts)
