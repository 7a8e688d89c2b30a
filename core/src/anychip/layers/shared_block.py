"""Zamba2's shared transformer block: attention and a feed-forward block whose weights several layers share. Each layer
that uses them adds low-rank products of its own.

Source: Glorioso et al., "The Zamba2 Suite", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.layers.attention import Attention
from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, ReplicatedLinear, RowParallelLinear
from anychip.layers.norm import RMSNorm
from anychip.plugin_api import REPLICATED, AttentionSpec, ForwardContext, Placed, Sharded


@dataclass(frozen=True, slots=True)
class Share:
    """A low-rank product: its modules are `name`.0 and `name`.1, and its outputs lie over the ranks as `placed` has
    each of the stretches of `rows`."""

    name: str
    rows: tuple[int, ...]
    placed: Placed = REPLICATED


class LowRankSum:
    """What shares give for the same tokens, side by side [num_tokens, outputs of this rank]."""

    def __init__(self, builder: Builder, in_features: int, rank: int, shares: Sequence[Share]) -> None:
        self.rank = rank
        self.down = ColumnParallelLinear(
            builder,
            in_features=in_features,
            projections=[Projection(f"down{at}", f"{share.name}.0", rank) for at, share in enumerate(shares)],
        )
        self.up = [self._up(builder, rank, share) for share in shares]

    @staticmethod
    def _up(builder: Builder, rank: int, share: Share) -> ColumnParallelLinear:
        projections, first = [], 0
        for at, rows in enumerate(share.rows):
            whole = sum(share.rows) if len(share.rows) > 1 else 0
            projections.append(Projection(f"up{at}", f"{share.name}.1", rows, share.placed, first=first, of=whole))
            first += rows
        return ColumnParallelLinear(builder, in_features=rank, projections=projections)

    def __call__(self, x: Tensor) -> Tensor:
        parts = self.down(x).chunk(len(self.up), dim=-1)
        return torch.cat([up(part.contiguous()) for up, part in zip(self.up, parts, strict=True)], dim=-1)


class SharedBlock:
    """What layers share. `attention` reads a token's hidden state beside its embedding, `intermediate_size` is that of
    the feed-forward block."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        attention: Attention,
        hidden_size: int,
        intermediate_size: int,
        eps: float,
        bias: bool,
    ) -> None:
        self.name = name
        self.attention = attention
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.input_norm = RMSNorm(builder, name=f"{name}.input_layernorm", size=2 * hidden_size, eps=eps)
        self.norm = RMSNorm(builder, name=f"{name}.pre_ff_layernorm", size=hidden_size, eps=eps)
        module, by_rank = f"{name}.feed_forward.gate_up_proj", (Sharded(dim=0),)
        self.gate_up = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=[
                Projection("gate", module, intermediate_size, by_rank, of=2 * intermediate_size),
                Projection("up", module, intermediate_size, by_rank, first=intermediate_size, of=2 * intermediate_size),
            ],
            bias=bias,
        )
        self.down = RowParallelLinear(
            builder,
            name=f"{name}.feed_forward.down_proj",
            in_features=intermediate_size,
            placed=(Sharded(dim=1),),
            out_features=hidden_size,
            bias=bias,
        )


class SharedBlockUse:
    """A layer's use of a shared block: the `place`-th of all. `linear` names the projection behind it. `adapts`:
    whether attention has low-rank products too."""

    def __init__(
        self,
        builder: Builder,
        block: SharedBlock,
        *,
        linear: str,
        place: int,
        index: int,
        spec: AttentionSpec,
        rank: int,
        adapts: bool,
    ) -> None:
        self.block, hidden = block, block.hidden_size
        heads = (Sharded(dim=0, unit=spec.head_dim),)
        further = None
        if adapts:
            names = [f"{block.name}.self_attn.linear_{part}_adapter_list.{place}" for part in "qkv"]
            further = LowRankSum(builder, 2 * hidden, rank, [Share(name, (2 * hidden,), heads) for name in names])
        self.attention = block.attention.again(builder, spec, index, further)
        name, size = f"{block.name}.feed_forward.gate_up_proj_adapter_list.{place}", block.intermediate_size
        self.further = LowRankSum(builder, hidden, rank, [Share(name, (size, size), (Sharded(dim=0),))])
        self.linear = ReplicatedLinear(builder, name=linear, in_features=hidden, out_features=hidden)

    def __call__(self, x: Tensor, embedded: Tensor, context: ForwardContext) -> Tensor:
        block = self.block
        attended = self.attention(block.input_norm(torch.cat((x, embedded), dim=-1)), context)
        normed = block.norm(attended)
        gate, up = (block.gate_up(normed) + self.further(normed)).chunk(2, dim=-1)
        return self.linear(block.down(F.gelu(gate) * up))
