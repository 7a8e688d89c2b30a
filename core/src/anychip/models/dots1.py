"""dots.llm1: Qwen3's attention, some layers with a window, and DeepSeek V3's experts (config.json:
Dots1ForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.model_config import ModelConfig
from anychip.models.config_kinds import given_layer_types
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.models.deepseek import corrected_routing, experts, is_dense
from anychip.plugin_api import AttentionSpec, Rope


class Dots1(Decoder):
    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        whole = config.num_layers if config.get("sliding_window") is None else int(config.need("max_window_layers"))
        return given_layer_types(config) or [
            "full_attention" if index < whole else "sliding_attention" for index in range(config.num_layers)
        ]

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        config = self.config
        bias = bool(config.get("attention_bias", False))
        attention = self.self_attention(builder, index, spec, rope, bias=bias, qk_norm_eps=config.norm_eps)
        if is_dense(config, index):
            return PreNormLayer(builder, config, index, attention, self.gated_mlp(builder, index))
        return PreNormLayer(
            builder, config, index, attention, experts(self, builder, index, **corrected_routing(config))
        )
