"""The toys: Llama's frame around layers of any kind. Their weights are random, and mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, ReplicatedLinear, RowParallelLinear
from anychip.model_config import ModelConfig
from anychip.models.decoder import Decoder, DecoderLayer, PreNormLayer, full_attention
from anychip.plugin_api import (
    ActFormat,
    CacheSpec,
    CanonicalArray,
    ForwardContext,
    LatentLayer,
    LatentSpec,
    MeshShape,
    Rope,
    Sharded,
    StateLayer,
    StateSpec,
    WeightView,
)
from anychip.types import DType


class StateMixer:
    """Projections to the inputs of a gated sum, and one back."""

    def __init__(self, builder: Builder, config: ModelConfig, index: int, spec: StateSpec) -> None:
        name, size = f"model.layers.{index}.mixer", config.hidden_size
        width = int(config.need("state_width"))
        self.inputs = ColumnParallelLinear(
            builder,
            in_features=size,
            projections=[
                Projection("x", f"{name}.x_proj", width, (Sharded(dim=0),)),
                Projection("gate", f"{name}.gate_proj", width, (Sharded(dim=0),)),
            ],
        )
        self.output = RowParallelLinear(
            builder, name=f"{name}.o_proj", in_features=width, placed=(Sharded(dim=1),), out_features=size
        )
        self.backend = builder.platform.state(spec)
        self.layer = StateLayer(index=index, ops=builder.ops)

    @property
    def accepts(self) -> ActFormat:
        return self.inputs.accepts

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        x, gate = self.inputs(hidden).chunk(2, dim=-1)
        return self.output(context.advance(self.backend, self.layer, {"x": x, "gate": gate.sigmoid()}))


class LatentMixer:
    """Multi-head latent attention without norms: queries as they are, keys and values out of the rows."""

    def __init__(
        self, builder: Builder, config: ModelConfig, index: int, spec: LatentSpec, rope: Rope, *, rows: int
    ) -> None:
        name, size, heads = f"model.layers.{index}.mixer", config.hidden_size, config.num_heads
        head_dim = spec.nope_dim + spec.rope_dim
        self.query = ColumnParallelLinear(
            builder,
            in_features=size,
            projections=[Projection("q", f"{name}.q_proj", heads * head_dim, (Sharded(dim=0, unit=head_dim),))],
        )
        self.row = ReplicatedLinear(builder, name=f"{name}.row_proj", in_features=size, out_features=rows)
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.o_proj",
            in_features=heads * spec.v_dim,
            placed=(Sharded(dim=1, unit=spec.v_dim),),
            out_features=size,
        )
        self.backend = builder.platform.latent(spec)
        self.spec, self.rope = spec, rope
        self.layer = LatentLayer(
            index=index,
            scale=head_dim**-0.5,
            ops=builder.ops,
            k_up=_wanted(builder, f"{name}.k_up", (heads, spec.nope_dim, spec.latent_dim)),
            v_up=_wanted(builder, f"{name}.v_up", (heads, spec.v_dim, spec.latent_dim)),
        )

    @property
    def accepts(self) -> ActFormat:
        return self.row.accepts if self.query.accepts == self.row.accepts else ActFormat(dtype=self.spec.dtype)

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        spec = self.spec
        query = self.query(hidden).view(len(hidden), spec.num_heads, -1)
        q_nope, q_rope = query.tensor_split([spec.nope_dim], dim=-1)
        latent, k_rope = self.row(hidden).tensor_split([spec.latent_dim], dim=-1)
        attended = context.attend_latent(self.backend, self.layer, q_nope, q_rope, latent, k_rope, rope=self.rope)
        return self.output(attended.flatten(1))


def _wanted(builder: Builder, name: str, shape: tuple[int, ...]) -> Tensor:
    """This rank's heads of a tensor [heads, ...]."""
    span = builder.split(shape[0], "query heads")
    held = builder.platform.empty((span.count, *shape[1:]), builder.dtype, "weights")

    def take(view: WeightView) -> None:
        held.copy_(view.read(span.bounds))

    builder.weights.want(name, shape, take)
    return held


class ToyOfKinds(Decoder):
    @classmethod
    def attention_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> Any:
        full = replace(full_attention(config, shape, dtype), kv_dtype=kv_dtype)
        width = Sharded(dim=0).count(int(config.need("state_width")), shape, "state channels")
        kinds: dict[str, CacheSpec] = {
            "full": full,
            "window": replace(full, window=cls.window(config)),
            "latent": LatentSpec(
                num_heads=full.num_heads,
                latent_dim=int(config.need("latent_dim")),
                rope_dim=config.head_dim,
                nope_dim=int(config.need("nope_dim")),
                v_dim=int(config.need("v_dim")),
                dtype=dtype,
                kv_dtype=kv_dtype,
            ),
            "state": StateSpec(
                recurrence="gated_sum", arrays=(CanonicalArray("sum", (width,), "float32"),), dtype=dtype
            ),
        }
        return [kinds[kind] for kind in _kinds(config)]

    def layer(self, builder: Builder, index: int, spec: Any, rope: Rope) -> DecoderLayer:
        config = self.config
        mixer: Any
        match spec:
            case StateSpec():
                mixer = StateMixer(builder, config, index, spec)
            case LatentSpec():
                mixer = LatentMixer(builder, config, index, spec, rope, rows=spec.row_dim)
            case _:
                mixer = self.self_attention(builder, index, spec, rope)
        return PreNormLayer(builder, config, index, mixer, self.gated_mlp(builder, index))


def _kinds(config: ModelConfig) -> Sequence[str]:
    kinds: list[str] = config.need("layer_kinds")[: config.num_layers]
    return kinds
