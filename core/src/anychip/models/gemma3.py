"""Gemma 3, text only: Gemma 2 with norms on queries and keys, five windowed layers for each full one, and a rotary
embedding of their own for the windowed ones (config.json: Gemma3ForCausalLM)."""

from __future__ import annotations

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.rotary import Parameters, make_rope
from anychip.model_config import ModelConfig
from anychip.models.config_kinds import given_layer_types
from anychip.models.gemma2 import Gemma2, SandwichLayer
from anychip.plugin_api import AttentionSpec, Rope


class Gemma3(Gemma2):
    attention_softcap = False

    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        every = int(config.get("sliding_window_pattern", 6))
        return given_layer_types(config) or [
            "sliding_attention" if (index + 1) % every else "full_attention" for index in range(config.num_layers)
        ]

    def rope(self, builder: Builder) -> Rope:
        device = builder.platform.default_device
        self.local_rope = make_rope(self.config, self._rope_parameters("sliding_attention"), device)
        return make_rope(self.config, self._rope_parameters("full_attention"), device)

    def _rope_parameters(self, kind: str) -> Parameters:
        """By layer type since transformers 5; before, rope_local_base_freq was the windowed layers' own."""
        config = self.config
        settings = config.get("rope_parameters") or {}
        if settings and not {"sliding_attention", "full_attention"} & settings.keys():
            raise Unsupported("Gemma 3", ["rope_parameters that are not given by layer type"])
        own = settings.get(kind) or {}
        if kind == "sliding_attention":
            return {"rope_theta": config.get("rope_local_base_freq", 10_000.0), **own}
        return {"rope_theta": config.get("rope_theta", 1_000_000.0), **own, **(config.get("rope_scaling") or {})}

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> SandwichLayer:
        config = self.config
        attention = self.self_attention(
            builder,
            index,
            spec,
            rope if spec.window is None else self.local_rope,
            scale=float(config.get("query_pre_attn_scalar", config.head_dim)) ** -0.5,
            bias=bool(config.get("attention_bias", False)),
            qk_norm_eps=config.norm_eps,
            qk_norm_unit_offset=True,
        )
        mlp = self.gated_mlp(builder, index)
        return SandwichLayer(builder, config, index, attention, mlp)
