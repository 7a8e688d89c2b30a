"""GPT-OSS: attention sinks, windows on every other layer, clamped SwiGLU experts with biases, stacked in one tensor
(config.json: GptOssForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.moe import PutExpert, SparseMoE
from anychip.layers.stacked_experts import stack_piece
from anychip.model_config import ModelConfig
from anychip.models.config_kinds import given_layer_types
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import AttentionSpec, MeshShape, MoESpec, Rope, WeightView
from anychip.types import DType
from anychip.weights.matrix import MatrixStack, Span, StackPiece


class GptOss(Decoder):
    @classmethod
    def attention_specs(
        cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> list[AttentionSpec]:
        return [replace(spec, sinks=True) for spec in super().attention_specs(config, shape, dtype, kv_dtype)]

    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        return given_layer_types(config) or [
            "full_attention" if index % 2 else "sliding_attention" for index in range(config.num_layers)
        ]

    def layer(self, builder: Builder, index: int, spec: AttentionSpec, rope: Rope) -> PreNormLayer:
        config = self.config
        swiglu = (config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0))
        if swiglu != (1.702, 7.0):
            raise Unsupported("GPT-OSS", [f"swiglu_alpha and swiglu_limit {swiglu}; experts are built for 1.702 and 7"])
        moe = MoESpec(
            num_experts=int(config.need("num_local_experts")),
            top_k=int(config.need("num_experts_per_tok")),
            hidden_size=config.hidden_size,
            intermediate_size=builder.expert_features(config.intermediate_size),
            dtype=builder.dtype,
            activation="swiglu_clamped",
            bias=True,
        )
        experts = InterleavedExperts(
            builder,
            name=f"model.layers.{index}.mlp",
            spec=moe,
            intermediate_size=config.intermediate_size,
            router="router",
            router_bias=True,
        )
        attention = self.self_attention(builder, index, spec, rope, bias=bool(config.get("attention_bias", True)))
        return PreNormLayer(builder, config, index, attention, experts)


class InterleavedExperts(SparseMoE):
    """gate_up_proj holds gate and up of every expert in turns, [num_experts, hidden_size, 2 * intermediate_size] where
    it is plain, and down_proj [num_experts, intermediate_size, hidden_size]."""

    def _adapt(self, builder: Builder, *_: object) -> None:
        what = "adapters of experts whose gate and up stand in turns; leave experts out of --adapter-targets"
        raise Unsupported(builder.platform.name, [what])

    def modules(self, name: str, count: int, names: Sequence[str]) -> list[str]:
        return [f"{name}.gate_up_proj", f"{name}.down_proj"]

    def want_experts(
        self, builder: Builder, name: str, intermediate_size: int, span: Span, names: Sequence[str]
    ) -> None:
        count, hidden_size = self.spec.num_experts, self.spec.hidden_size
        hidden = Span(0, hidden_size)
        # The sum over ranks that share an expert's features must hold its bias once.
        adds_bias = span.start == 0
        own, wide = span.times(2), 2 * intermediate_size
        halves = (("gate", 0), ("up", 1))
        wide_shape, tall_shape = (intermediate_size, hidden_size), (hidden_size, intermediate_size)

        def half(part: str, first: int) -> StackPiece:
            places = slice(own.start + first, own.start + own.count, 2)
            return stack_piece(self, name, part, places, shape=wide_shape, cut=(span, hidden))

        gate_up = tuple(half(part, first) for part, first in halves)
        down = stack_piece(self, name, "down", slice(0, hidden_size), shape=tall_shape, cut=(hidden, span))
        for module, shape, pieces in (
            ("gate_up_proj", (wide, hidden_size), gate_up),
            ("down_proj", tall_shape, (down,)),
        ):
            stack = MatrixStack(name=f"{name}.{module}", count=count, held=self.held, shape=shape, pieces=pieces)
            builder.formats.want_stack(builder.weights, stack)

        def take_gate_up_bias(view: WeightView) -> None:
            bias = view.read(self.held.bounds, own.bounds)
            for place in range(self.held.count):
                for part, first in halves:
                    PutExpert(self, place, part)("bias", bias[place, first::2])

        def take_down_bias(view: WeightView) -> None:
            bias = view.read(self.held.bounds)
            for place in range(self.held.count):
                PutExpert(self, place, "down")("bias", bias[place] if adds_bias else bias[place] * 0)

        builder.weights.want(f"{name}.gate_up_proj_bias", (count, wide), take_gate_up_bias)
        builder.weights.want(f"{name}.down_proj_bias", (count, hidden_size), take_down_bias)
