"""Gated delta nets: queries, keys and values through a causal convolution, the gated delta rule, a gated norm of each
head, one projection back.

Source: Yang et al., "Gated Delta Networks", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
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
    state_spec,
)
from anychip.types import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSizes:
    """Of the whole layer. Neighbouring heads of values share a head of keys, and ranks share the heads of keys."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int
    """Of the convolution, in tokens."""

    @property
    def repeats(self) -> int:
        return self.value_heads // self.key_heads

    @property
    def by_head(self) -> tuple[Sharded, ...]:
        """Of what has a row for each head of values."""
        return (Sharded(dim=0, unit=self.repeats),)

    @property
    def channels(self) -> list[Stretch]:
        """Of the convolution: queries, keys and values."""
        keys = Stretch(self.key_heads * self.key_dim, (Sharded(dim=0, unit=self.key_dim),))
        unit = self.repeats * self.value_dim
        return [keys, keys, Stretch(self.value_heads * self.value_dim, (Sharded(dim=0, unit=unit),))]

    def specs(self, shape: MeshShape, dtype: DType) -> list[StateSpec]:
        """What one rank's layer keeps: the convolution's inputs, and the states."""
        heads = Sharded(dim=0).count(self.key_heads, shape, "key heads of state layers")
        channels = heads * (2 * self.key_dim + self.repeats * self.value_dim)
        return [
            conv_spec(channels, self.width, dtype),
            state_spec(
                "gated_delta", dtype, heads=heads * self.repeats, key_dim=self.key_dim, value_dim=self.value_dim
            ),
        ]


class _Inputs(NamedTuple):
    """What a token gives to the net, of this rank's heads."""

    mixed: Tensor  # [num_tokens, channels]: queries, keys and values, before the convolution
    gate: Tensor  # [num_tokens, value heads * value_dim]
    beta: Tensor  # [num_tokens, value heads]
    decay: Tensor  # [num_tokens, value heads]


class GatedDeltaNet:
    """`index` is the place of its first spec among the model's. The checkpoint has one matrix for queries, keys and
    values, below one another, and one each for gates, betas and decays."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        index: int,
        specs: Sequence[StateSpec],
        sizes: DeltaSizes,
        hidden_size: int,
        eps: float,
    ) -> None:
        self.sizes = sizes
        self.inputs = ColumnParallelLinear(builder, in_features=hidden_size, projections=self.projections(name))
        self.parts = [part.rows for part in self.inputs.kernel.spec.parts]
        self.conv = CausalConv(
            builder, name=f"{name}.conv1d", index=index, spec=specs[0], stretches=sizes.channels, bias=False
        )
        heads = [Stretch(sizes.value_heads, sizes.by_head)]
        self.a = HeldRows(builder, f"{name}.A_log", heads, dtype="float32", made=lambda log: -log.exp())
        self.dt_bias = HeldRows(builder, f"{name}.dt_bias", heads, dtype="float32")
        self.backend = builder.platform.state(specs[1])
        self.layer = StateLayer(index=index + 1, ops=builder.ops)
        self.norm = HeadNorm(builder, name=f"{name}.norm", size=sizes.value_dim, eps=eps)
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.out_proj",
            in_features=sizes.value_heads * sizes.value_dim,
            placed=(Sharded(dim=1, unit=sizes.repeats * sizes.value_dim),),
            out_features=hidden_size,
        )

    def projections(self, name: str) -> list[Projection]:
        """What is made of the hidden states, in one product."""
        sizes, first, found = self.sizes, 0, []
        rows = sum(stretch.rows for stretch in sizes.channels)
        for part, stretch in zip("qkv", sizes.channels, strict=True):
            module = f"{name}.in_proj_qkv"
            found.append(Projection(part, module, stretch.rows, stretch.placed, first=first, of=rows))
            first += stretch.rows
        values = sizes.channels[2]
        found.append(Projection("z", f"{name}.in_proj_z", values.rows, values.placed))
        return found + [
            Projection(part, f"{name}.in_proj_{part}", sizes.value_heads, sizes.by_head) for part in ("b", "a")
        ]

    def taken_apart(self, projected: Tensor) -> _Inputs:
        q, k, v, gate, beta, decay = self.parts
        return _Inputs(*projected.split_with_sizes([q + k + v, gate, beta, decay], dim=-1))

    @property
    def backends(self) -> list[StateBackend]:
        return [self.conv.backend, self.backend]

    @property
    def accepts(self) -> ActFormat:
        return self.inputs.accepts

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        sizes, count = self.sizes, len(hidden)
        mixed, gate, beta, decay = self.taken_apart(self.inputs(hidden))
        mixed = self.conv(mixed, context)
        keys = beta.shape[1] // sizes.repeats * sizes.key_dim
        q, k, v = mixed.split_with_sizes([keys, keys, mixed.shape[1] - 2 * keys], dim=-1)
        inputs = {
            "q": q.reshape(count, -1, sizes.key_dim),
            "k": k.reshape(count, -1, sizes.key_dim),
            "v": v.reshape(count, -1, sizes.value_dim),
            "g": self.a.rows * F.softplus(decay.float() + self.dt_bias.rows),
            "beta": beta.float().sigmoid(),
        }
        found = context.advance(self.backend, self.layer, inputs)
        return self.output(self.norm(found, gate.reshape(count, -1, sizes.value_dim)).flatten(1))


class DeltaNetByHead(GatedDeltaNet):
    """The checkpoint's matrices hold the parts of one head of keys together: its query, key, values and gates; and its
    betas and decays."""

    def projections(self, name: str) -> list[Projection]:
        sizes = self.sizes
        wide, narrow = 2 * (sizes.key_dim + sizes.repeats * sizes.value_dim), 2 * sizes.repeats
        return [
            Projection("qkvz", f"{name}.in_proj_qkvz", sizes.key_heads * wide, (Sharded(dim=0, unit=wide),)),
            Projection("ba", f"{name}.in_proj_ba", sizes.key_heads * narrow, (Sharded(dim=0, unit=narrow),)),
        ]

    def taken_apart(self, projected: Tensor) -> _Inputs:
        sizes, count = self.sizes, len(projected)
        qkvz, ba = projected.split_with_sizes(self.parts, dim=-1)
        values = sizes.repeats * sizes.value_dim
        q, k, v, gate = qkvz.reshape(count, -1, 2 * (sizes.key_dim + values)).split_with_sizes(
            [sizes.key_dim, sizes.key_dim, values, values], dim=-1
        )
        beta, decay = ba.reshape(count, -1, 2 * sizes.repeats).chunk(2, dim=-1)
        mixed = torch.cat([part.flatten(1) for part in (q, k, v)], dim=-1)
        return _Inputs(mixed, gate.flatten(1), beta.flatten(1), decay.flatten(1))
