"""GPT-OSS: attention sinks, windows on every other layer, clamped SwiGLU experts with biases, stacked in one tensor
(config.json: GptOssForCausalLM, unquantized weights)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.mlp import PutExpert, SparseMoE
from anychip.model_config import ModelConfig
from anychip.models.decoder import Decoder, PreNormLayer, given_layer_types
from anychip.plugin_api import AttentionSpec, MeshShape, MoESpec, Rope, WeightView
from anychip.quantization.format import put_rows
from anychip.types import DType
from anychip.weights.matrix import Matrix, Span


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
            intermediate_size=builder.split(config.intermediate_size, "expert features").count,
            dtype=builder.dtype,
            activation="swiglu_clamped",
            bias=True,
        )
        experts = StackedExperts(
            builder,
            name=f"model.layers.{index}.mlp",
            spec=moe,
            intermediate_size=config.intermediate_size,
            router="router",
            router_bias=True,
        )
        attention = self.self_attention(builder, index, spec, rope, bias=bool(config.get("attention_bias", True)))
        return PreNormLayer(builder, config, index, attention, experts)


class StackedExperts(SparseMoE):
    """gate_up_proj [num_experts, hidden_size, 2 * intermediate_size] holds gate and up in turns, down_proj
    [num_experts, intermediate_size, hidden_size]: inputs before outputs, unlike a linear layer's."""

    def want_experts(
        self, builder: Builder, name: str, intermediate_size: int, span: Span, names: Sequence[str]
    ) -> None:
        count, hidden_size = self.spec.num_experts, self.spec.hidden_size
        hidden, first_rank = Span(0, hidden_size), self.communicator.rank == 0
        here = list(enumerate(range(*self.held.bounds)))  # (place among those held here, expert)
        halves = (("gate", 0), ("up", 1))

        def put(place: int, part: str, rows: Tensor) -> None:
            down = part == "down"
            matrix = Matrix(
                name=f"{name}.{self.held.start + place}.{part}",
                shape=(hidden_size, intermediate_size) if down else (intermediate_size, hidden_size),
                rows=hidden if down else span,
                columns=span if down else hidden,
                scheme=self.spec.scheme,
                put=PutExpert(self, place, part),
            )
            put_rows(matrix, rows)

        def take_gate_up(view: WeightView) -> None:
            for place, expert in here:
                both = view.read((expert, expert + 1))[0].T[2 * span.start : 2 * (span.start + span.count)]
                for part, first in halves:
                    put(place, part, both[first::2])

        def take_down(view: WeightView) -> None:
            for place, expert in here:
                put(place, "down", view.read((expert, expert + 1))[0].T)

        def take_gate_up_bias(view: WeightView) -> None:
            bias = view.read(self.held.bounds, span.times(2).bounds)
            for place in range(self.held.count):
                for part, first in halves:
                    PutExpert(self, place, part)("bias", bias[place, first::2])

        def take_down_bias(view: WeightView) -> None:
            bias = view.read(self.held.bounds)
            for place in range(self.held.count):
                # The sum over ranks must hold it once.
                PutExpert(self, place, "down")("bias", bias[place] if first_rank else bias[place] * 0)

        wide = 2 * intermediate_size
        builder.weights.want(f"{name}.gate_up_proj", (count, hidden_size, wide), take_gate_up)
        builder.weights.want(f"{name}.down_proj", (count, intermediate_size, hidden_size), take_down)
        builder.weights.want(f"{name}.gate_up_proj_bias", (count, wide), take_gate_up_bias)
        builder.weights.want(f"{name}.down_proj_bias", (count, hidden_size), take_down_bias)
