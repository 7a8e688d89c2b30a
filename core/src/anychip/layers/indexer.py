"""The lightning indexer: a few small heads, by which each query chooses the tokens that it attends to.

Source: DeepSeek-AI, "DeepSeek-V3.2-Exp", 2025, section 2.1. The published code turns queries and keys by a Hadamard
matrix before it rounds them to fp8. The matrix changes no product, so it is left out.
"""

from __future__ import annotations

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ReplicatedLinear
from anychip.layers.norm import LayerNorm
from anychip.plugin_api import IndexInputs, Rope

_EPS = 1e-6


class Indexer:
    """All ranks compute all of it: what is chosen serves every head. `rope` turns the first values of each head."""

    def __init__(
        self, builder: Builder, *, name: str, hidden_size: int, query_rank: int, num_heads: int, dim: int, rope: Rope
    ) -> None:
        self.num_heads, self.dim, self.rope = num_heads, dim, rope
        self.query = ReplicatedLinear(
            builder, name=f"{name}.wq_b", in_features=query_rank, out_features=num_heads * dim
        )
        self.key = ReplicatedLinear(builder, name=f"{name}.wk", in_features=hidden_size, out_features=dim)
        self.key_norm = LayerNorm(builder, name=f"{name}.k_norm", size=dim, eps=_EPS)
        self.weights = ReplicatedLinear(
            builder, name=f"{name}.weights_proj", in_features=hidden_size, out_features=num_heads
        )

    def __call__(self, x: Tensor, query_latent: Tensor) -> IndexInputs:
        """x [num_tokens, hidden_size], query_latent [num_tokens, query_rank]."""
        return IndexInputs(
            queries=self.query(query_latent).view(-1, self.num_heads, self.dim),
            keys=self.key_norm(self.key(x)),
            weights=self.weights(x).float(),
        )
