"""StarCoder2: layer norms, biases, and a feed-forward block without a gate; one window for every layer
(config.json: Starcoder2ForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.encoder import activation_of
from anychip.layers.norm import LayerNorm
from anychip.layers.plain_mlp import PlainMLP
from anychip.model_config import ModelConfig
from anychip.models.decoder import PreNormLayer
from anychip.models.mistral import Mistral
from anychip.plugin_api import AttentionSpec, Rope


class Starcoder2(Mistral):
    @classmethod
    def norm_layer(cls, builder: Builder, config: ModelConfig, name: str) -> LayerNorm:
        return LayerNorm(builder, name=name, size=config.hidden_size, eps=config.norm_eps)

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        config = self.config
        bias = bool(config.get("use_bias", True))
        mlp = PlainMLP(
            builder,
            name=f"model.layers.{index}.mlp",
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            activation=activation_of(config.architecture, config.get("hidden_act", "gelu_pytorch_tanh")),
            bias=bias,
            names=("c_fc", "c_proj"),
        )
        attention = self.self_attention(builder, index, spec, rope, bias=bias)
        return PreNormLayer(builder, config, index, attention, mlp, norm=self.norm_layer)
