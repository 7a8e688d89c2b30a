"""Qwen3-Next's gated delta net: queries, keys and values through a causal convolution, the gated delta rule, a gated
norm of each head, one projection back.

Source: Yang et al., "Gated Delta Networks", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


class GatedDeltaNet:
    """`index` is the place of its first spec among the model's. The checkpoint's matrices hold the parts of one head of
    keys together: its query, key, values and gates; and its beta and decays."""

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
        wide, narrow = 2 * (sizes.key_dim + sizes.repeats * sizes.value_dim), 2 * sizes.repeats
        self.inputs = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=[
                Projection("qkvz", f"{name}.in_proj_qkvz", sizes.key_heads * wide, (Sharded(dim=0, unit=wide),)),
                Projection("ba", f"{name}.in_proj_ba", sizes.key_heads * narrow, (Sharded(dim=0, unit=narrow),)),
            ],
        )
        self.parts = [part.rows for part in self.inputs.kernel.spec.parts]
        self.conv = CausalConv(
            builder, name=f"{name}.conv1d", index=index, spec=specs[0], stretches=sizes.channels, bias=False
        )
        heads = [Stretch(sizes.value_heads, (Sharded(dim=0, unit=sizes.repeats),))]
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

    @property
    def backends(self) -> list[StateBackend]:
        return [self.conv.backend, self.backend]

    @property
    def accepts(self) -> ActFormat:
        return self.inputs.accepts

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        sizes, count = self.sizes, len(hidden)
        qkvz, ba = self.inputs(hidden).split_with_sizes(self.parts, dim=-1)
        values = sizes.repeats * sizes.value_dim
        q, k, v, z = qkvz.reshape(count, -1, 2 * (sizes.key_dim + values)).split_with_sizes(
            [sizes.key_dim, sizes.key_dim, values, values], dim=-1
        )
        b, a = ba.reshape(count, -1, 2 * sizes.repeats).chunk(2, dim=-1)
        mixed = self.conv(torch.cat([part.flatten(1) for part in (q, k, v)], dim=-1), context)
        keys = q.shape[1] * sizes.key_dim
        q, k, v = mixed.split_with_sizes([keys, keys, mixed.shape[1] - 2 * keys], dim=-1)
        inputs = {
            "q": q.reshape(count, -1, sizes.key_dim),
            "k": k.reshape(count, -1, sizes.key_dim),
            "v": v.reshape(count, -1, sizes.value_dim),
            "g": self.a.rows * F.softplus(a.flatten(1).float() + self.dt_bias.rows),
            "beta": b.flatten(1).float().sigmoid(),
        }
        found = context.advance(self.backend, self.layer, inputs)
        return self.output(self.norm(found, z.reshape(count, -1, sizes.value_dim)).flatten(1))
