"""Kimi delta attention (KDA): a delta rule whose states forget at a rate of each channel.

Source: Moonshot AI, "Kimi Linear", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.causal_conv import CausalConv, conv_spec
from anychip.layers.gated_norm import HeadNorm
from anychip.layers.held_rows import HeldRows, Stretch
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.plugin_api import (
    ActFormat,
    ForwardContext,
    MeshShape,
    Sharded,
    StateBackend,
    StateLayer,
    StateSpec,
    WeightView,
    state_spec,
)
from anychip.types import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiDeltaSizes:
    """Of the whole layer, whose heads are divided over the ranks."""

    heads: int
    head_dim: int
    width: int
    """Of the convolutions, in tokens."""

    @property
    def features(self) -> int:
        return self.heads * self.head_dim

    @property
    def by_head(self) -> tuple[Sharded, ...]:
        return (Sharded(dim=0, unit=self.head_dim),)

    @property
    def channels(self) -> list[Stretch]:
        """Of the convolutions: queries, keys and values."""
        return [Stretch(self.features, self.by_head)] * 3

    def specs(self, shape: MeshShape, dtype: DType) -> list[StateSpec]:
        """What one rank's layer keeps: the convolutions' inputs, and the states."""
        heads = Sharded(dim=0).count(self.heads, shape, "heads of state layers")
        return [
            conv_spec(3 * heads * self.head_dim, self.width, dtype),
            state_spec("kda", dtype, heads=heads, key_dim=self.head_dim, value_dim=self.head_dim),
        ]


class KimiDeltaAttention:
    """`index` is the place of its first spec among the model's. Decays and gates are made of a few values of a token,
    `head_dim` of each."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        index: int,
        specs: Sequence[StateSpec],
        sizes: KimiDeltaSizes,
        hidden_size: int,
        eps: float,
    ) -> None:
        self.head_dim = dim = sizes.head_dim
        heads = (Sharded(dim=0),)
        self.inputs = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=[
                *(Projection(part, f"{name}.{part}_proj", sizes.features, sizes.by_head) for part in "qkv"),
                Projection("beta", f"{name}.b_proj", sizes.heads, heads),
                Projection("decay", f"{name}.f_a_proj", dim),
                Projection("gate", f"{name}.g_a_proj", dim),
            ],
        )
        self.parts = [part.rows for part in self.inputs.kernel.spec.parts]
        self.decay, self.gate = (
            ColumnParallelLinear(
                builder,
                in_features=dim,
                projections=[Projection(part, f"{name}.{part}_b_proj", sizes.features, sizes.by_head)],
            )
            for part in "fg"
        )
        modules = [f"{name}.{part}_conv1d" for part in "qkv"]
        self.conv = CausalConv(builder, name=modules, index=index, spec=specs[0], stretches=sizes.channels, bias=False)
        self.a = self._rates(builder, f"{name}.A_log", sizes.heads)
        bias = [Stretch(sizes.features, sizes.by_head)]
        self.dt_bias = HeldRows(builder, f"{name}.dt_bias", bias, dtype="float32")
        self.backend = builder.platform.state(specs[1])
        self.layer = StateLayer(index=index + 1, ops=builder.ops)
        self.norm = HeadNorm(builder, name=f"{name}.o_norm", size=dim, eps=eps, squashed=True)
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.o_proj",
            in_features=sizes.features,
            placed=(Sharded(dim=1, unit=dim),),
            out_features=hidden_size,
        )

    @staticmethod
    def _rates(builder: Builder, name: str, heads: int) -> Tensor:
        """[heads of this rank, 1] float32, of a tensor [1, 1, heads, 1]."""
        span = builder.split(heads, "heads of state layers")
        rates = builder.platform.empty((span.count, 1), "float32", "weights")

        def take(view: WeightView) -> None:
            rates.copy_(-view.read((0, 1)).float().flatten()[slice(*span.bounds)].unsqueeze(1).exp())

        builder.weights.want(name, (1, 1, heads, 1), take)
        return rates

    @property
    def backends(self) -> list[StateBackend]:
        return [self.conv.backend, self.backend]

    @property
    def accepts(self) -> ActFormat:
        return self.inputs.accepts

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.head_dim)

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        mixed, beta, decay, gate = self.inputs(hidden).split_with_sizes([sum(self.parts[:3]), *self.parts[3:]], dim=-1)
        q, k, v = self.conv(mixed, context).chunk(3, dim=-1)
        steps = F.softplus(self.decay(decay).float() + self.dt_bias.rows)
        inputs = {
            "q": self._by_head(q),
            "k": self._by_head(k),
            "v": self._by_head(v),
            "g": self.a * self._by_head(steps),
            "beta": beta.float().sigmoid(),
        }
        found = context.advance(self.backend, self.layer, inputs)
        return self.output(self.norm(found, self._by_head(self.gate(gate))).flatten(1))
