"""Mamba-2's mixer: one projection to everything, a causal convolution, SSD, a gated norm, one projection back.

Source: Dao and Gu, "Transformers are SSMs", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.causal_conv import CausalConv, conv_spec
from anychip.layers.gated_norm import GatedNorm
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
    state_spec,
)
from anychip.types import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Sizes:
    """Of the whole layer. Heads are divided over the ranks, and groups with them; of fewer groups than ranks,
    neighbours hold the same one."""

    heads: int
    head_dim: int
    state_dim: int
    groups: int
    width: int
    """Of the convolution, in tokens."""

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def by_head(self) -> tuple[Sharded, ...]:
        return (Sharded(dim=0, unit=self.head_dim),)

    @property
    def by_group(self) -> tuple[Sharded, ...]:
        return (Sharded(dim=0, unit=self.state_dim, uneven="repeat"),)

    @property
    def channels(self) -> list[Stretch]:
        """Of the convolution: x, b and c."""
        shared = Stretch(self.groups * self.state_dim, self.by_group)
        return [Stretch(self.inner, self.by_head), shared, shared]

    def specs(self, shape: MeshShape, dtype: DType) -> list[StateSpec]:
        """What one rank's mixer keeps: the convolution's inputs, and the states."""
        heads = Sharded(dim=0).count(self.heads, shape, "state heads")
        shared = self.by_group[0].count(self.groups * self.state_dim, shape, "state groups")
        channels = heads * self.head_dim + 2 * shared
        return [
            conv_spec(channels, self.width, dtype),
            state_spec("ssd", dtype, heads=heads, head_dim=self.head_dim, state_dim=self.state_dim),
        ]


class Mamba2:
    """`index` is the place of its first spec among the model's. `multipliers` are those of gate, x, b, c and dt.
    `norm_eps` None: the gate multiplies the output, and no norm stands behind it."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        index: int,
        specs: Sequence[StateSpec],
        sizes: Mamba2Sizes,
        hidden_size: int,
        norm_eps: float | None,
        norm_first: bool = False,
        norm_groups: int | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        conv_bias: bool = True,
        dt_limits: tuple[float, float] = (0.0, math.inf),
        multipliers: Sequence[float] = (1.0,) * 5,
    ) -> None:
        self.sizes = sizes
        channels, by_rank = sizes.channels, (Sharded(dim=0),)
        stretches = [Stretch(sizes.inner, sizes.by_head), *channels, Stretch(sizes.heads, by_rank)]
        rows, first, projections = sum(stretch.rows for stretch in stretches), 0, []
        for part, stretch in zip(("gate", "x", "b", "c", "dt"), stretches, strict=True):
            projections.append(Projection(part, f"{name}.in_proj", stretch.rows, stretch.placed, first=first, of=rows))
            first += stretch.rows
        self.inputs = ColumnParallelLinear(builder, in_features=hidden_size, projections=projections, bias=bias)
        self.parts = [part.rows for part in self.inputs.kernel.spec.parts]
        self.multipliers = self._multipliers(builder, multipliers)
        self.conv = CausalConv(
            builder, name=f"{name}.conv1d", index=index, spec=specs[0], stretches=channels, bias=conv_bias
        )
        of_heads = [Stretch(sizes.heads, by_rank)]
        self.a = HeldRows(builder, f"{name}.A_log", of_heads, dtype="float32", made=lambda log: -log.exp())
        self.d = HeldRows(builder, f"{name}.D", of_heads, dtype="float32")
        self.dt_bias = HeldRows(builder, f"{name}.dt_bias", of_heads, dtype="float32")
        self.dt_limits = dt_limits
        self.backend = builder.platform.state(specs[1])
        self.layer = StateLayer(index=index + 1, ops=builder.ops, weights={"a": self.a.rows, "d": self.d.rows})
        self.norm: GatedNorm | None = None
        if norm_eps is not None:
            self.norm = GatedNorm(
                builder,
                name=f"{name}.norm",
                features=sizes.inner,
                groups=norm_groups or sizes.groups,
                placed=sizes.by_head,
                eps=norm_eps,
                norm_first=norm_first,
            )
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.out_proj",
            in_features=sizes.inner,
            placed=(Sharded(dim=1, unit=sizes.head_dim),),
            out_features=hidden_size,
            bias=bias if output_bias is None else output_bias,
        )

    def _multipliers(self, builder: Builder, multipliers: Sequence[float]) -> Tensor | None:
        """[rows of the projection]; None where all are 1."""
        if all(each == 1.0 for each in multipliers):
            return None
        held = builder.platform.empty((sum(self.parts),), builder.dtype, "weights")
        for part, each in zip(held.split_with_sizes(self.parts), multipliers, strict=True):
            part.fill_(each)
        return held

    @property
    def backends(self) -> list[StateBackend]:
        return [self.conv.backend, self.backend]

    @property
    def accepts(self) -> ActFormat:
        return self.inputs.accepts

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        projected = self.inputs(hidden)
        if self.multipliers is not None:
            projected = projected * self.multipliers
        inner, _, shared, _, heads = self.parts
        gate, mixed, dt = projected.split_with_sizes([inner, inner + 2 * shared, heads], dim=-1)
        x, b, c = self.conv(mixed, context).split_with_sizes([inner, shared, shared], dim=-1)
        inputs = {
            "x": x.reshape(len(x), heads, -1),
            "dt": F.softplus(dt.float() + self.dt_bias.rows).clamp(*self.dt_limits),
            "b": b.reshape(len(b), -1, self.sizes.state_dim),
            "c": c.reshape(len(c), -1, self.sizes.state_dim),
        }
        found = context.advance(self.backend, self.layer, inputs).flatten(1)
        if self.norm is None:
            return self.output(found * F.silu(gate))
        return self.output(self.norm(found, gate))
