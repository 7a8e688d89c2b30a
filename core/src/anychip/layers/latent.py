"""Multi-head latent attention: queries by head, one row per token that all heads share, output projection.

Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.indexer import Indexer
from anychip.layers.linear import ColumnParallelLinear, Projection, ReplicatedLinear, RowParallelLinear
from anychip.layers.norm import RMSNorm
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import ActFormat, ForwardContext, LatentBackend, LatentLayer, LatentSpec, Rope, Sharded
from anychip.weights.matrix import Matrix

_HEADS = (Sharded(dim=0),)


class LatentAttention:
    """`spec` holds this rank's head count; `scale` multiplies q.k. `query_rank`: queries are made from a latent of
    their own of this size; None: from the hidden states. `norm_eps` is that of the latents' norms. `bias`: whether the
    projections from and to the hidden states add one. `indexer` chooses the tokens that queries attend to; None: all,
    or, where `spec` has index keys, those that a layer before has chosen. Adapters may stand beside every projection
    but the indexer's and kv_b_proj, which is no product here."""

    placed_tensors = MappingProxyType({"k_up": _HEADS, "v_up": _HEADS})
    _stored: QuantizedMatrix
    """What a container holds of both, until it is turned back."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        index: int,
        spec: LatentSpec,
        hidden_size: int,
        num_heads: int,
        scale: float,
        rope: Rope,
        query_rank: int | None,
        norm_eps: float,
        bias: bool = False,
        indexer: Indexer | None = None,
    ) -> None:
        self.indexer = indexer
        query_dim = spec.nope_dim + spec.rope_dim
        self.query_down: ReplicatedLinear | None = None
        query, query_in = f"{name}.q_proj", hidden_size
        if query_rank is not None:
            self.query_down = ReplicatedLinear(
                builder,
                name=f"{name}.q_a_proj",
                in_features=hidden_size,
                out_features=query_rank,
                bias=bias,
                adapts=True,
            )
            self.query_norm = RMSNorm(builder, name=f"{name}.q_a_layernorm", size=query_rank, eps=norm_eps)
            query, query_in = f"{name}.q_b_proj", query_rank
        self.query = ColumnParallelLinear(
            builder,
            in_features=query_in,
            projections=[Projection("q", query, num_heads * query_dim, (Sharded(dim=0, unit=query_dim),))],
            adapts=True,
        )
        self.row = ReplicatedLinear(
            builder,
            name=f"{name}.kv_a_proj_with_mqa",
            in_features=hidden_size,
            out_features=spec.row_dim,
            bias=bias,
            adapts=True,
        )
        self.row_norm = RMSNorm(builder, name=f"{name}.kv_a_layernorm", size=spec.latent_dim, eps=norm_eps)
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.o_proj",
            in_features=num_heads * spec.v_dim,
            placed=(Sharded(dim=1, unit=spec.v_dim),),
            out_features=hidden_size,
            bias=bias,
            adapts=True,
        )
        self.spec, self.rope = spec, rope
        self.backend = builder.platform.latent(spec)
        self.k_up = builder.platform.empty((spec.num_heads, spec.nope_dim, spec.latent_dim), builder.dtype, "weights")
        self.v_up = builder.platform.empty((spec.num_heads, spec.v_dim, spec.latent_dim), builder.dtype, "weights")
        self.layer = LatentLayer(index=index, scale=scale, ops=builder.ops, k_up=self.k_up, v_up=self.v_up)
        self._want_up(builder, f"{name}.kv_b_proj", num_heads)

    def _want_up(self, builder: Builder, name: str, num_heads: int) -> None:
        """k_up above v_up of every head, one matrix of the checkpoint. Both are factors and not products, so they are
        plain here: a container's values are turned back, and, as for routers, nothing is quantized at load."""
        spec = self.spec
        rows = spec.nope_dim + spec.v_dim
        placed = (Sharded(dim=0, unit=rows),)
        shape = (num_heads * rows, spec.latent_dim)
        mine, columns = builder.held(shape, placed, f"rows of {name}")
        formats = builder.formats.for_router()
        scheme = formats.scheme(name, spec.latent_dim)
        if scheme is not None:
            self._stored = QuantizedMatrix.allocate((mine.count, spec.latent_dim), scheme, builder.platform)
            builder.weights.finishers.append(self._turn_back)

        def put(kind: str, tensor: Tensor, row: int = 0) -> None:
            if scheme is None:
                self._copy_up(tensor, row)
            else:
                self._stored.load(kind, tensor, 0, mine.count, row)

        matrix = Matrix(name=name, shape=shape, rows=mine, columns=columns, scheme=scheme, put=put)
        formats.want(builder.weights, matrix)

    def _turn_back(self) -> None:
        self._copy_up(self._stored.dequantize(), 0)
        del self._stored

    def _copy_up(self, chunk: Tensor, first: int) -> None:
        """Rows [n, latent_dim] of the checkpoint's matrix, from this rank's row `first` on."""
        spec = self.spec
        size, chunk = spec.nope_dim + spec.v_dim, chunk.to(self.k_up)
        places = torch.arange(first, first + len(chunk), device=chunk.device)
        head, place = places // size, places % size
        keys, values = place < spec.nope_dim, place >= spec.nope_dim
        self.k_up[head[keys], place[keys]] = chunk[keys]
        self.v_up[head[values], place[values] - spec.nope_dim] = chunk[values]

    @property
    def backends(self) -> list[LatentBackend]:
        return [self.backend]

    @property
    def accepts(self) -> ActFormat:
        """What all products of the hidden states take: plain values, where they differ."""
        first = self.query if self.query_down is None else self.query_down
        same = first.accepts == self.row.accepts and self.indexer is None
        return self.row.accepts if same else ActFormat(dtype=self.spec.dtype)

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor:
        spec, adapters = self.spec, context.adapters
        query = x if self.query_down is None else self.query_norm(self.query_down(x, adapters))
        q_nope, q_rope = (
            self.query(query, adapters)
            .view(-1, spec.num_heads, spec.nope_dim + spec.rope_dim)
            .split_with_sizes([spec.nope_dim, spec.rope_dim], dim=-1)
        )
        latent, k_rope = self.row(x, adapters).split_with_sizes([spec.latent_dim, spec.rope_dim], dim=-1)
        latent = self.row_norm(latent)
        if self.indexer is not None:
            context.choose(self.backend, self.layer, self.indexer(x, query), rope=self.indexer.rope)
        attended = context.attend_latent(self.backend, self.layer, q_nope, q_rope, latent, k_rope, rope=self.rope)
        return self.output(attended.flatten(1), adapters)
