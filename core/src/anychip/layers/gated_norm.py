"""RMS norm of groups of features beside a gate, as state layers have it before their output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.held_rows import HeldRows, Stretch
from anychip.layers.norm import RMSNorm
from anychip.plugin_api import Placed, Span


class GatedNorm:
    """norm(x * silu(gate)), or norm(x) * silu(gate) with `norm_first`, over each of `groups` equal groups of features.
    `placed` divides the features over the ranks; a group that several ranks share is normed by its sum over them."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        features: int,
        groups: int,
        placed: Placed,
        eps: float,
        norm_first: bool = False,
    ) -> None:
        self.weight = HeldRows(builder, f"{name}.weight", [Stretch(features, placed)])
        self.size = features // groups
        self.eps = eps
        self.norm_first = norm_first
        self.communicator = builder.mesh.axis("tp")
        self.is_whole = len(self.weight.rows) % self.size == 0
        per_group = max(1, self.communicator.size // groups)
        self.sharers = Span(self.communicator.rank // per_group * per_group, per_group)  # ranks that hold this group

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [num_tokens, features of this rank]."""
        wide, gated = x.float(), F.silu(gate.float())
        if not self.norm_first:
            wide = wide * gated
        grouped = wide.reshape(len(wide), -1, min(self.size, wide.shape[-1]))
        squares = grouped.square().sum(dim=-1, keepdim=True)
        if not self.is_whole:
            by_rank = self.communicator.all_gather(squares.flatten(1))  # [num_tokens, ranks]
            squares = by_rank[:, slice(*self.sharers.bounds)].sum(dim=-1).view(-1, 1, 1)
        normed = (grouped * torch.rsqrt(squares / self.size + self.eps)).flatten(1)
        normed = self.weight.rows * normed.to(x.dtype)
        if self.norm_first:
            normed = (normed * gated).to(x.dtype)
        return normed


class HeadNorm:
    """norm(x) * silu(gate) over the last dimension, with one weight for all heads; with `squashed`, norm(x) *
    sigmoid(gate)."""

    def __init__(self, builder: Builder, *, name: str, size: int, eps: float, squashed: bool = False) -> None:
        self.norm = RMSNorm(builder, name=name, size=size, eps=eps)
        self.squashed = squashed

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [num_tokens, heads, size]."""
        wide = gate.float()
        return (self.norm(x) * (wide.sigmoid() if self.squashed else F.silu(wide))).to(x.dtype)
