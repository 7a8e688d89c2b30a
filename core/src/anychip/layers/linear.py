"""Projections: several checkpoint matrices packed into one product, split by columns or by rows over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from anychip.layers.build import Builder
from anychip.plugin_api import REPLICATED, ActFormat, LinearKernel, LinearPart, LinearSpec, Placed, Span, WeightView
from anychip.weights.matrix import Matrix


@dataclass(frozen=True, slots=True)
class Projection:
    """A part of `rows` rows, cut from the matrix of checkpoint module `name`: from row `first` on, of `of` rows. 0: it
    is the whole matrix. Of the part, this rank holds what `placed` says."""

    part: str
    name: str
    rows: int
    placed: Placed = REPLICATED
    first: int = 0
    of: int = 0


class _PackedLinear:
    """A kernel and its weights; what the two kinds of parallel projection share."""

    kernel: LinearKernel

    def __init__(self, builder: Builder, spec: LinearSpec) -> None:
        self.kernel = builder.platform.linear(spec)
        self.packed = self.kernel.begin()
        builder.weights.finishers.append(self._finish)

    def _finish(self) -> None:
        self.packed = self.kernel.finish(self.packed)

    def put(self, part: str) -> PutPart:
        return PutPart(self, part)

    def want_bias(self, builder: Builder, name: str, rows: int, span: Span, part: str) -> None:
        def take(view: WeightView) -> None:
            self.put(part)("bias", view.read(span.bounds))

        builder.weights.want(f"{name}.bias", (rows,), take)

    @property
    def accepts(self) -> ActFormat:
        return self.kernel.accepts


@dataclass(frozen=True, slots=True)
class PutPart:
    """weights.matrix.Put for one part of a product."""

    layer: _PackedLinear
    part: str

    def __call__(self, kind: str, tensor: Tensor, row: int = 0) -> None:
        part = f"{self.part}.{kind}" if kind else self.part
        self.layer.kernel.load(self.layer.packed, part, tensor, row=row)


class ColumnParallelLinear(_PackedLinear):
    """Output features are split over ranks; nothing is communicated. Packs qkv and gate-up projections."""

    def __init__(
        self,
        builder: Builder,
        *,
        in_features: int,
        projections: Sequence[Projection],
        bias: bool = False,
        epilogue: str | None = None,
    ) -> None:
        """`epilogue` is taken where the device has it for this product: `has_epilogue` tells."""
        parts, spans, offset = [], [], 0
        for each in projections:
            span, _ = builder.held((each.rows, in_features), each.placed, f"rows of {each.name}")
            parts.append(LinearPart(name=each.part, offset=offset, rows=span.count, placed=each.placed))
            spans.append(span.after(each.first))
            offset += span.count
        scheme = builder.scheme([projection.name for projection in projections], in_features)
        fused = scheme is None and epilogue in builder.platform.capabilities.epilogues
        spec = LinearSpec(
            in_features=in_features,
            out_features=offset,
            parts=tuple(parts),
            dtype=builder.dtype,
            bias=bias,
            scheme=scheme,
            epilogue=epilogue if fused else None,
        )
        super().__init__(builder, spec)
        self.has_epilogue = fused
        for projection, span in zip(projections, spans, strict=True):
            name, rows = projection.name, projection.of or projection.rows
            builder.formats.want(
                builder.weights,
                Matrix(
                    name=name,
                    shape=(rows, in_features),
                    rows=span,
                    columns=Span(0, in_features),
                    scheme=scheme,
                    put=self.put(projection.part),
                ),
            )
            if bias:
                self.want_bias(builder, name, rows, span, projection.part)

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernel.apply(x, self.packed)


class RowParallelLinear(_PackedLinear):
    """Input features are split over ranks; the partial products are summed over them."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        in_features: int,
        placed: Placed,
        out_features: int,
        bias: bool = False,
    ) -> None:
        """`placed` divides the matrix [out_features, in_features] by columns, along tp."""
        scheme = builder.scheme([name], in_features)
        self.communicator = builder.mesh.axis("tp")
        bias_here = bias and self.communicator.rank == 0  # the sum over ranks must hold it once
        rows, columns = builder.held((out_features, in_features), placed, f"columns of {name}")
        spec = LinearSpec(
            in_features=columns.count,
            out_features=out_features,
            parts=(LinearPart(name="all", offset=0, rows=out_features, placed=placed),),
            dtype=builder.dtype,
            bias=bias_here,
            scheme=scheme,
        )
        super().__init__(builder, spec)
        self.ops = builder.ops
        builder.formats.want(
            builder.weights,
            Matrix(
                name=name,
                shape=(out_features, in_features),
                rows=rows,
                columns=columns,
                scheme=scheme,
                put=self.put("all"),
            ),
        )
        if bias_here:
            self.want_bias(builder, name, out_features, rows, "all")
        elif bias:
            builder.weights.want(f"{name}.bias", (out_features,), lambda view: None)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.matmul_reduce(x=x, kernel=self.kernel, packed=self.packed, communicator=self.communicator)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's part of the sum."""
        return self.kernel.apply(x, self.packed)


class ReplicatedLinear(ColumnParallelLinear):
    """The whole product on every rank: routers, and projections that do not split."""

    def __init__(self, builder: Builder, *, name: str, in_features: int, out_features: int, bias: bool = False) -> None:
        projection = Projection("all", name, out_features)
        super().__init__(builder, in_features=in_features, projections=[projection], bias=bias)
