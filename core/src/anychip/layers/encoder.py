"""What encoders are made of: attention without a cache, layer norms, and feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.plugin_api import EncoderLayer, EncoderSpec, ForwardContext, Rope, Sharded, WeightView

_ROWS = (Sharded(dim=0),)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
"""By transformers' names."""


def activation_of(architecture: str, name: str) -> Callable[[Tensor], Tensor]:
    """Raises Unsupported for one that is not known."""
    if name not in _ACTIVATIONS:
        raise Unsupported(architecture, [f"activation {name!r}; known are {', '.join(_ACTIVATIONS)}"])
    return _ACTIVATIONS[name]


class Table:
    """A matrix of vectors by small integers, [rows, size], whole on every rank."""

    def __init__(self, builder: Builder, *, name: str, rows: int, size: int) -> None:
        self.weight = builder.platform.empty((rows, size), builder.dtype, "weights")

        def load(view: WeightView) -> None:
            self.weight.copy_(view.read((0, rows)))

        builder.weights.want(f"{name}.weight", (rows, size), load)

    def __call__(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.long(), self.weight)


class EncoderAttention:
    """`names` are the checkpoint's modules for queries, keys and values; a single one holds all three below one
    another. `relative` is EncoderLayer.bias."""

    def __init__(
        self,
        builder: Builder,
        *,
        names: Sequence[str],
        output: str,
        index: int,
        spec: EncoderSpec,
        hidden_size: int,
        num_heads: int,
        bias: bool = True,
        rope: Rope | None = None,
        relative: Tensor | None = None,
    ) -> None:
        dim = spec.head_dim
        rows, heads = num_heads * dim, (Sharded(dim=0, unit=dim),)
        if len(names) == 1:
            projections = [
                Projection(part, names[0], rows, heads, first=at * rows, of=3 * rows) for at, part in enumerate("qkv")
            ]
        else:
            projections = [Projection(part, name, rows, heads) for part, name in zip("qkv", names, strict=True)]
        self.qkv = ColumnParallelLinear(builder, in_features=hidden_size, projections=projections, bias=bias)
        self.output = RowParallelLinear(
            builder,
            name=output,
            in_features=rows,
            placed=(Sharded(dim=1, unit=dim),),
            out_features=hidden_size,
            bias=bias,
        )
        self.head_dim = dim
        self.backend = builder.platform.encoder(spec)
        self.layer = EncoderLayer(index=index, scale=dim**-0.5, ops=builder.ops, bias=relative)
        self.rope = rope

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, -1, self.head_dim).unbind(dim=1)
        return self.output(context.encode(self.backend, self.layer, q, k, v, rope=self.rope).flatten(1))


class FeedForward:
    """down(act(up(x))); gated: down(act(first half of up(x)) * second half). `names`: up's module, or the first half's
    and the second half's, and down's. A gated block with one name has both halves below one another."""

    def __init__(
        self,
        builder: Builder,
        *,
        names: Sequence[str],
        down: str,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Tensor], Tensor],
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        size = intermediate_size
        if gated and len(names) == 1:
            projections = [
                Projection("act", names[0], size, _ROWS, of=2 * size),
                Projection("gate", names[0], size, _ROWS, first=size, of=2 * size),
            ]
        else:
            projections = [Projection(f"part{at}", name, size, _ROWS) for at, name in enumerate(names)]
        self.up = ColumnParallelLinear(builder, in_features=hidden_size, projections=projections, bias=bias)
        self.down = RowParallelLinear(
            builder,
            name=down,
            in_features=size,
            placed=(Sharded(dim=1),),
            out_features=hidden_size,
            bias=bias,
        )
        self.activation = activation
        self.gated = gated

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gated:
            first, second = hidden.chunk(2, dim=-1)
            return self.down(self.activation(first) * second)
        return self.down(self.activation(hidden))


def relative_buckets(distances: Tensor, *, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """T5's bucket of each distance of a key from its query, in both directions: half of the buckets are for keys behind
    the query; near distances have one each, far ones share by their logarithm. Source: Raffel et al., 2020."""
    half = num_buckets // 2
    near = half // 2
    far = distances.abs()
    steps = torch.log(far.float().clamp(min=1) / near) / torch.log(torch.tensor(max_distance / near)) * (half - near)
    shared = (near + steps.long()).clamp(max=half - 1)
    return torch.where(far < near, far, shared) + (distances > 0).long() * half
