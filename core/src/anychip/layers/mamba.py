"""Mamba's mixer: a causal convolution, a selective scan whose steps, inputs and outputs follow from each token, a gate.

Source: Gu and Dao, "Mamba", 2023. Jamba norms what the token decides (Lieber et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.causal_conv import CausalConv, conv_spec
from anychip.layers.held_rows import HeldRows, Stretch
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.layers.norm import RMSNorm
from anychip.plugin_api import (
    ActFormat,
    ForwardContext,
    MeshShape,
    Sharded,
    StateBackend,
    StateLayer,
    StateSpec,
    state_spec,
)
from anychip.types import DType

_BY_CHANNEL = (Sharded(dim=0),)


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaSizes:
    """Of the whole layer. Channels are divided over the ranks."""

    channels: int
    state_dim: int
    dt_rank: int
    width: int
    """Of the convolution, in tokens."""

    def specs(self, shape: MeshShape, dtype: DType) -> list[StateSpec]:
        """What one rank's mixer keeps: the convolution's inputs, and the states."""
        channels = Sharded(dim=0).count(self.channels, shape, "state channels")
        return [
            conv_spec(channels, self.width, dtype),
            state_spec("selective_scan", dtype, channels=channels, state_dim=self.state_dim),
        ]


class Mamba:
    """`index` is the place of its first spec among the model's. `norm_eps`: the token's step, input and output vectors
    go through norms."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        index: int,
        specs: Sequence[StateSpec],
        sizes: MambaSizes,
        hidden_size: int,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float | None = None,
    ) -> None:
        channels, module = sizes.channels, f"{name}.in_proj"
        self.inputs = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=[
                Projection("x", module, channels, _BY_CHANNEL, of=2 * channels),
                Projection("gate", module, channels, _BY_CHANNEL, first=channels, of=2 * channels),
            ],
            bias=bias,
        )
        stretches = [Stretch(channels, _BY_CHANNEL)]
        self.conv = CausalConv(
            builder, name=f"{name}.conv1d", index=index, spec=specs[0], stretches=stretches, bias=conv_bias
        )
        self.parts = [sizes.dt_rank, sizes.state_dim, sizes.state_dim]
        self.of_token = RowParallelLinear(
            builder,
            name=f"{name}.x_proj",
            in_features=channels,
            placed=(Sharded(dim=1),),
            out_features=sum(self.parts),
        )
        self.norms: list[RMSNorm] = []
        if norm_eps is not None:
            self.norms = [
                RMSNorm(builder, name=f"{name}.{part}_layernorm", size=size, eps=norm_eps)
                for part, size in zip(("dt", "b", "c"), self.parts, strict=True)
            ]
        self.dt = ColumnParallelLinear(
            builder,
            in_features=sizes.dt_rank,
            projections=[Projection("dt", f"{name}.dt_proj", channels, _BY_CHANNEL)],
            bias=True,
        )
        self.a = HeldRows(
            builder, f"{name}.A_log", stretches, inner=(sizes.state_dim,), dtype="float32", made=lambda x: -x.exp()
        )
        self.d = HeldRows(builder, f"{name}.D", stretches, dtype="float32")
        self.backend = builder.platform.state(specs[1])
        self.layer = StateLayer(index=index + 1, ops=builder.ops, weights={"a": self.a.rows, "d": self.d.rows})
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.out_proj",
            in_features=channels,
            placed=(Sharded(dim=1),),
            out_features=hidden_size,
            bias=bias,
        )

    @property
    def backends(self) -> list[StateBackend]:
        return [self.conv.backend, self.backend]

    @property
    def accepts(self) -> ActFormat:
        return self.inputs.accepts

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        x, gate = self.inputs(hidden).chunk(2, dim=-1)
        x = self.conv(x, context)
        parts = self.of_token(x).split_with_sizes(self.parts, dim=-1)
        step, b, c = (norm(part) for norm, part in zip(self.norms, parts, strict=True)) if self.norms else parts
        inputs = {"x": x, "dt": F.softplus(self.dt(step).float()), "b": b, "c": c}
        return self.output(context.advance(self.backend, self.layer, inputs) * F.silu(gate))
