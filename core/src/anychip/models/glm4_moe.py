"""GLM-4.5 and GLM-4.6: Llama's attention with a share of each head rotated, and DeepSeek V3's experts
(config.json: Glm4MoeForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.layers.build import Builder
from anychip.model_config import ModelConfig
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.models.deepseek import corrected_routing, experts, is_dense
from anychip.plugin_api import AttentionSpec, CacheSpec, Rope


class Glm4MoE(Decoder):
    partial_rotary = True

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[CacheSpec]) -> None:
        builder.stored.leave_out_layers(config.num_layers)
        super().__init__(config, builder, specs)

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        config = self.config
        attention = self.self_attention(
            builder,
            index,
            spec,
            rope,
            bias=bool(config.get("attention_bias", False)),
            output_bias=False,
            qk_norm_eps=config.norm_eps if config.get("use_qk_norm", False) else None,
        )
        if is_dense(config, index):
            return PreNormLayer(builder, config, index, attention, self.gated_mlp(builder, index))
        sparse = experts(self, builder, index, **corrected_routing(config))
        return PreNormLayer(builder, config, index, attention, sparse)
