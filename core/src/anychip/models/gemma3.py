"""Gemma 3, text only: Gemma 2 with norms on queries and keys, five windowed layers for each full one, and a rotary
embedding of their own for the windowed ones (config.json: Gemma3ForCausalLM)."""

from __future__ import annotations

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.rotary import Parameters, make_rope
from anychip.model_config import ModelConfig, rope_parameters
from anychip.models.gemma2 import Gemma2, SandwichLayer
from anychip.plugin_api import AttentionSpec, Rope


class Gemma3(Gemma2):
    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        every = int(config.get("sliding_window_pattern", 6))
        return config.get("layer_types") or [
            "sliding_attention" if (index + 1) % every else "full_attention" for index in range(config.num_layers)
        ]

    def rope(self, builder: Builder) -> Rope:
        if self.config.get("use_bidirectional_attention"):
            raise Unsupported("Gemma 3", ["use_bidirectional_attention: true; this is a decoder"])
        device = builder.platform.default_device
        self.local_rope = make_rope(self.config, self._rope_parameters("sliding_attention"), device)
        return make_rope(self.config, self._rope_parameters("full_attention"), device)

    def _rope_parameters(self, kind: str) -> Parameters:
        """By layer type since transformers 5; before, rope_local_base_freq was the windowed layers' own."""
        settings = rope_parameters(self.config)
        if kind in settings:
            return dict(settings[kind])
        if kind == "sliding_attention":
            return {"rope_theta": self.config.get("rope_local_base_freq", 10_000.0)}
        return {"rope_theta": self.config.get("rope_theta", 1_000_000.0), **settings}

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> SandwichLayer:
        config = self.config
        attention = self.self_attention(
            builder,
            index,
            spec,
            rope if spec.window is None else self.local_rope,
            scale=float(config.get("query_pre_attn_scalar", config.head_dim)) ** -0.5,
            qk_norm_eps=config.norm_eps,
            qk_norm_unit_offset=True,
        )
        mlp = self.gated_mlp(builder, index, activation="gelu_tanh")
        return SandwichLayer(builder, config, index, attention, mlp)
