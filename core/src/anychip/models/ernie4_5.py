"""ERNIE 4.5, text: Llama whose rotated pairs are neighbours, dense and with experts beside shared ones (config.json:
Ernie4_5ForCausalLM, Ernie4_5_MoeForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.layers.rotary import make_rope
from anychip.model_config import ModelConfig, rope_parameters
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, Rope, WeightView


class Ernie45(Decoder):
    @property
    def bias(self) -> bool:
        return bool(self.config.get("use_bias", False))

    def rope(self, builder: Builder) -> Rope:
        device = builder.platform.default_device
        return make_rope(self.config, rope_parameters(self.config), device, interleaved=True)

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        attention = self.self_attention(builder, index, spec, rope, bias=self.bias)
        return PreNormLayer(builder, self.config, index, attention, self.feed_forward(builder, index))

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        return self.gated_mlp(builder, index, bias=self.bias)


class Ernie45MoE(Ernie45):
    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[Any]) -> None:
        if config.get("use_bias"):
            raise Unsupported(config.architecture, ["use_bias, which adds one to the output head too"])
        builder.weights.elsewhere += ("model.mtp_",)  # they predict further tokens
        super().__init__(config, builder, specs)

    def is_sparse(self, index: int) -> bool:
        config = self.config
        last = int(config.get("moe_layer_end_index", -1))
        first, every = int(config.get("moe_layer_start_index", 1)), int(config.get("moe_layer_interval", 1))
        return (index + 1) % every == 0 and first <= index <= (last if last >= 0 else config.num_layers - 1)

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        if not self.is_sparse(index):
            return super().feed_forward(builder, index)
        config, name = self.config, f"model.layers.{index}.mlp"
        size, num_shared = int(config.need("moe_intermediate_size")), int(config.need("moe_num_shared_experts"))
        shared: GatedMLP | None = None
        if num_shared:
            shared = GatedMLP(
                builder,
                name=f"{name}.shared_experts",
                hidden_size=config.hidden_size,
                intermediate_size=size * num_shared,
                activation=self.activation,
            )
        spec = self.experts_spec(
            builder,
            num_experts=int(config.need("num_experts")),
            top_k=int(config.need("num_experts_per_tok")),
            intermediate_size=size,
            router_bias=True,
        )
        correction = "moe_statics.e_score_correction_bias"
        return _Experts(builder, name=name, spec=spec, intermediate_size=size, correction=correction, shared=shared)


class _Experts(SparseMoE):
    @staticmethod
    def _wanted(builder: Builder, name: str, size: int) -> Tensor:
        """A vector [size], float32, that the checkpoint has as [1, size]."""
        held = builder.platform.empty((size,), "float32", "weights")

        def take(view: WeightView) -> None:
            held.copy_(view.read((0, 1))[0])

        builder.weights.want(name, (1, size), take)
        return held
