"""Self-attention: packed projection, the backend's fused forward, output projection."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.layers.norm import RMSNorm
from anychip.plugin_api import ActFormat, AttentionLayer, AttentionSpec, ForwardContext, QKNorm, Rope


class Attention:
    """`spec` holds this rank's head counts; `scale` multiplies q.k."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        index: int,
        spec: AttentionSpec,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        rope: Rope,
        bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        dim = spec.head_dim
        heads = builder.split(num_heads, "query heads").times(dim)
        kv_heads = builder.split_heads(num_kv_heads).times(dim)
        self.qkv = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=[
                Projection("q", f"{name}.q_proj", num_heads * dim, heads),
                Projection("k", f"{name}.k_proj", num_kv_heads * dim, kv_heads),
                Projection("v", f"{name}.v_proj", num_kv_heads * dim, kv_heads),
            ],
            bias=bias,
        )
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.o_proj",
            in_features=num_heads * dim,
            span=heads,
            out_features=hidden_size,
            bias=bias,
        )
        self.sizes = [heads.count, kv_heads.count, kv_heads.count]
        self.head_dim = dim
        self.backend = builder.platform.attention(spec)
        self.layer = AttentionLayer(index=index, scale=scale, ops=builder.ops)
        self.rope = rope
        self.qk_norm: QKNorm | None = None
        if qk_norm_eps is not None:
            q_norm = RMSNorm(builder, name=f"{name}.q_norm", size=dim, eps=qk_norm_eps)
            k_norm = RMSNorm(builder, name=f"{name}.k_norm", size=dim, eps=qk_norm_eps)
            self.qk_norm = QKNorm(q_weight=q_norm.weight, k_weight=k_norm.weight, eps=qk_norm_eps)

    @property
    def accepts(self) -> ActFormat:
        return self.qkv.accepts

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor:
        parts = torch.split(self.qkv(x), self.sizes, dim=-1)
        q, k, v = (part.view(len(x), -1, self.head_dim) for part in parts)
        index = self.layer.index
        attended, context.caches[index] = self.backend.forward(
            q,
            k,
            v,
            context.caches[index],
            context.plans[context.layer_groups[index]],
            self.layer,
            rope=self.rope,
            qk_norm=self.qk_norm,
        )
        return self.output(attended.flatten(1))
