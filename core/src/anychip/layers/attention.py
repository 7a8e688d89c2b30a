"""Self-attention: packed projection, the backend's fused forward, output projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.kv_scales import want_kv_scales
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.layers.norm import RMSNorm, WideQKNorm
from anychip.plugin_api import (
    KV_HEADS,
    ActFormat,
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    ForwardContext,
    Placed,
    QKNorm,
    Rope,
    Sharded,
    Span,
    WeightView,
)


def _rows_of_kv_heads(spec: AttentionSpec) -> Placed:
    """How key and value projections lie over the ranks: as the pages that hold what they make."""
    return tuple(replace(each, dim=0, unit=spec.head_dim) for each in spec.pages if each.dim == KV_HEADS)


Added = Callable[[Tensor], Tensor]
"""From hidden states [num_tokens, input_size] to what is added to queries, keys and values."""

_NAMES = MappingProxyType({"output": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"})


class Attention:
    """`spec` holds this rank's head counts; `scale` multiplies q.k. `fused_qkv` names the one checkpoint matrix that
    holds queries, keys and values below one another, where a family has that. `output_bias` None: as `bias`. Queries
    and keys are normed by head (`qk_norm_eps`) or over all heads (`wide_qk_norm_eps`), where an eps is given. `gated`:
    behind each head's query the projection has a gate, whose sigmoid multiplies what the head attends to. `names` are
    the checkpoint's for the output projection and the norms of queries and keys. `input_size` None: as `hidden_size`,
    which the output has."""

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
        rope: Rope | None,
        bias: bool = False,
        output_bias: bool | None = None,
        qk_norm_eps: float | None = None,
        qk_norm_unit_offset: bool = False,
        wide_qk_norm_eps: float | None = None,
        fused_qkv: str | None = None,
        gated: bool = False,
        names: Mapping[str, str] = _NAMES,
        input_size: int | None = None,
    ) -> None:
        dim = spec.head_dim
        q_dim = 2 * dim if gated else dim
        heads, kv_heads = (Sharded(dim=0, unit=q_dim),), _rows_of_kv_heads(spec)
        q_rows, kv_rows = num_heads * q_dim, num_kv_heads * dim
        if fused_qkv is None:
            projections = [
                Projection("q", f"{name}.q_proj", q_rows, heads),
                Projection("k", f"{name}.k_proj", kv_rows, kv_heads),
                Projection("v", f"{name}.v_proj", kv_rows, kv_heads),
            ]
        else:
            fused, rows = f"{name}.{fused_qkv}", q_rows + 2 * kv_rows
            projections = [
                Projection("q", fused, q_rows, heads, of=rows),
                Projection("k", fused, kv_rows, kv_heads, first=q_rows, of=rows),
                Projection("v", fused, kv_rows, kv_heads, first=q_rows + kv_rows, of=rows),
            ]
        self.qkv = ColumnParallelLinear(
            builder, in_features=input_size or hidden_size, projections=projections, bias=bias, adapts=True
        )
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.{names['output']}",
            in_features=num_heads * dim,
            placed=(Sharded(dim=1, unit=dim),),
            out_features=hidden_size,
            bias=bias if output_bias is None else output_bias,
            adapts=True,
        )
        self.gated = gated
        self.heads = [spec.num_heads * (2 if gated else 1), spec.num_kv_heads, spec.num_kv_heads]
        self.head_dim = dim
        self.backend = builder.attention(spec)
        self.layer = AttentionLayer(index=index, scale=scale, ops=builder.ops)
        if spec.sinks:
            self.layer.sinks = self._wanted(builder, f"{name}.sinks", num_heads, builder.split(num_heads, "sinks"))
        if builder.kv_scales:
            want_kv_scales(builder, name, spec, num_kv_heads, self.layer)
        self.rope = rope
        self.further: Added | None = None
        self.qk_norm: QKNorm | None = None
        if qk_norm_eps is not None:
            q_norm = RMSNorm(builder, name=f"{name}.{names['q_norm']}", size=dim, eps=qk_norm_eps)
            k_norm = RMSNorm(builder, name=f"{name}.{names['k_norm']}", size=dim, eps=qk_norm_eps)
            self.qk_norm = QKNorm(
                q_weight=q_norm.weight, k_weight=k_norm.weight, eps=qk_norm_eps, unit_offset=qk_norm_unit_offset
            )

        self.wide_qk_norm: WideQKNorm | None = None
        if wide_qk_norm_eps is not None:
            sizes, placed = (q_rows, kv_rows), (heads, kv_heads)
            spans = [
                builder.held((rows, hidden_size), place, "heads")[0] for rows, place in zip(sizes, placed, strict=True)
            ]
            self.wide_qk_norm = WideQKNorm(builder, name=name, sizes=sizes, spans=spans, eps=wide_qk_norm_eps)

    @staticmethod
    def _wanted(builder: Builder, name: str, size: int, span: Span) -> Tensor:
        """This rank's share of a vector [size], float32."""
        held = builder.platform.empty((span.count,), "float32", "weights")

        def take(view: WeightView) -> None:
            held.copy_(view.read(span.bounds))

        builder.weights.want(name, (size,), take)
        return held

    def again(self, builder: Builder, spec: AttentionSpec, index: int, further: Added | None) -> Attention:
        """The same weights with a cache of another layer, whose `index` is that of its spec. `further` is added to
        queries, keys and values."""
        other = copy(self)
        other.backend, other.further = builder.platform.attention(spec), further
        other.layer = replace(self.layer, index=index)
        return other

    @property
    def backends(self) -> list[AttentionBackend]:
        return [self.backend]

    @property
    def accepts(self) -> ActFormat:
        return self.qkv.accepts

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor:
        adapters = context.adapters
        packed = self.qkv(x, adapters)
        if self.further is not None:
            packed = packed + self.further(x)
        q, k, v = packed.view(x.shape[0], -1, self.head_dim).split_with_sizes(self.heads, dim=1)
        gate: Tensor | None = None
        if self.gated:
            q, gate = (part.contiguous() for part in q.reshape(len(q), -1, 2, self.head_dim).unbind(2))
        if self.wide_qk_norm is not None:
            q, k = self.wide_qk_norm(q, k)
        attended = context.attend(self.backend, self.layer, q, k, v, rope=self.rope, qk_norm=self.qk_norm)
        if gate is not None:
            attended = attended * gate.sigmoid()
        return self.output(attended.flatten(1), adapters)
