"""Projections: several checkpoint tensors packed into one product, split by columns or by rows over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from anychip.layers.build import Builder, Span
from anychip.plugin_api import ActFormat, LinearPart, LinearSpec, WeightView


@dataclass(frozen=True, slots=True)
class Projection:
    """One checkpoint tensor `name`.weight [rows, in_features], of which this rank holds `span` of the rows."""

    part: str
    name: str
    rows: int
    span: Span


class ColumnParallelLinear:
    """Output features are split over ranks; nothing is communicated. Packs qkv and gate-up projections."""

    def __init__(
        self, builder: Builder, *, in_features: int, projections: Sequence[Projection], bias: bool = False
    ) -> None:
        parts, offset = [], 0
        for projection in projections:
            parts.append(LinearPart(name=projection.part, offset=offset, rows=projection.span.count))
            offset += projection.span.count
        spec = LinearSpec(
            in_features=in_features, out_features=offset, parts=tuple(parts), dtype=builder.dtype, bias=bias
        )
        self.kernel = builder.platform.linear(spec)
        self.packed = self.kernel.begin()
        for projection in projections:
            self._want(builder, projection, in_features, bias)
        builder.weights.finishers.append(self._finish)

    def _want(self, builder: Builder, projection: Projection, in_features: int, bias: bool) -> None:
        span = projection.span

        def load_weight(view: WeightView) -> None:
            self.kernel.load(self.packed, projection.part, view.read(span.bounds, (0, in_features)))

        def load_bias(view: WeightView) -> None:
            self.kernel.load(self.packed, projection.part + ".bias", view.read(span.bounds))

        builder.weights.want(f"{projection.name}.weight", (projection.rows, in_features), load_weight)
        if bias:
            builder.weights.want(f"{projection.name}.bias", (projection.rows,), load_bias)

    def _finish(self) -> None:
        self.packed = self.kernel.finish(self.packed)

    @property
    def accepts(self) -> ActFormat:
        return self.kernel.accepts

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernel.apply(x, self.packed)


class RowParallelLinear:
    """Input features are split over ranks; the partial products are summed over them."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        in_features: int,
        span: Span,
        out_features: int,
        bias: bool = False,
    ) -> None:
        bias_here = bias and builder.shard.rank == 0  # the sum over ranks must hold it once
        spec = LinearSpec(
            in_features=span.count,
            out_features=out_features,
            parts=(LinearPart(name="all", offset=0, rows=out_features),),
            dtype=builder.dtype,
            bias=bias_here,
        )
        self.ops = builder.ops
        self.communicator = builder.shard.communicator
        self.kernel = builder.platform.linear(spec)
        self.packed = self.kernel.begin()

        def load_weight(view: WeightView) -> None:
            self.kernel.load(self.packed, "all", view.read((0, out_features), span.bounds))

        def load_bias(view: WeightView) -> None:
            if bias_here:
                self.kernel.load(self.packed, "all.bias", view.read((0, out_features)))

        builder.weights.want(f"{name}.weight", (out_features, in_features), load_weight)
        if bias:
            builder.weights.want(f"{name}.bias", (out_features,), load_bias)
        builder.weights.finishers.append(self._finish)

    def _finish(self) -> None:
        self.packed = self.kernel.finish(self.packed)

    @property
    def accepts(self) -> ActFormat:
        return self.kernel.accepts

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.matmul_reduce(x=x, kernel=self.kernel, packed=self.packed, communicator=self.communicator)
