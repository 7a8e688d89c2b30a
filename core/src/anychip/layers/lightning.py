"""MiniMax-01's lightning attention: linear attention whose heads forget at fixed rates, normed and gated.

Source: MiniMax, "MiniMax-01", 2025; Qin et al., "Lightning Attention-2", 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.held_rows import HeldRows, Stretch
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.plugin_api import ActFormat, ForwardContext, Sharded, StateBackend, StateLayer, StateSpec

_NORM_EPS = 1e-6
"""Of the norm behind it, whatever the model's norms have."""


def slopes(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """How fast each head forgets, [num_heads] float32: a geometric series, slower in later layers."""
    factor = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
    base = 1 / (2 ** (8 / num_heads))
    return base ** torch.arange(1, num_heads + 1).float() * factor


class LightningAttention:
    """Each head's rows of the projection are its query, key and value."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        index: int,
        spec: StateSpec,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        slopes: Tensor,
    ) -> None:
        rows, by_head = num_heads * head_dim, (Sharded(dim=0, unit=head_dim),)
        self.head_dim = head_dim
        self.inputs = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=[
                Projection("qkv", f"{name}.qkv_proj", 3 * rows, (Sharded(dim=0, unit=3 * head_dim),)),
                Projection("gate", f"{name}.output_gate", rows, by_head),
            ],
        )
        self.parts = [part.rows for part in self.inputs.kernel.spec.parts]
        held = builder.split(num_heads, "heads of lightning attention")
        self.slope = builder.platform.empty((held.count,), "float32", "weights").copy_(slopes[slice(*held.bounds)])
        self.backend = builder.platform.state(spec)
        self.layer = StateLayer(index=index, ops=builder.ops, weights={"slope": self.slope})
        self.norm = HeldRows(builder, f"{name}.norm.weight", [Stretch(rows, by_head)])
        self.features = rows
        self.communicator = builder.mesh.axis("tp")
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.out_proj",
            in_features=rows,
            placed=(Sharded(dim=1, unit=head_dim),),
            out_features=hidden_size,
        )

    @property
    def backends(self) -> list[StateBackend]:
        return [self.backend]

    @property
    def accepts(self) -> ActFormat:
        return self.inputs.accepts

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        qkv, gate = self.inputs(hidden).split_with_sizes(self.parts, dim=-1)
        q, k, v = F.silu(qkv).reshape(len(hidden), -1, 3, self.head_dim).unbind(2)
        found = context.advance(self.backend, self.layer, {"q": q, "k": k, "v": v}).flatten(1)
        wide = found.float()
        squares = self.communicator.all_reduce(wide.square().sum(dim=-1, keepdim=True))  # over all heads
        normed = (wide * torch.rsqrt(squares / self.features + _NORM_EPS)).to(found.dtype)
        return self.output(gate.sigmoid() * (self.norm.rows * normed))
