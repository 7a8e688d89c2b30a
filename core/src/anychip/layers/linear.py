"""Projections: several checkpoint matrices packed into one product, split by columns or by rows over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from anychip.layers.adapted import adapted
from anychip.layers.build import Builder
from anychip.layers.mixed_linear import Stored, linear_of
from anychip.plugin_api import (
    REPLICATED,
    ActFormat,
    AdaptedPart,
    AdapterSite,
    LinearKernel,
    LinearPart,
    LinearSpec,
    Placed,
    Span,
    StepAdapters,
    WeightView,
)
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
    """A kernel and its weights; what the two kinds of parallel projection share. `site`: where adapters go; None: the
    product takes none."""

    kernel: LinearKernel
    site: AdapterSite | None = None

    def __init__(self, builder: Builder, spec: LinearSpec, stored: Sequence[Stored]) -> None:
        """`stored` is what the parts are in."""
        self.ops = builder.ops
        self.kernel = linear_of(builder.platform, spec, stored)
        self._plain = not any(each.scheme for each in stored)
        self.packed = self.kernel.begin()
        builder.weights.finishers.append(self._finish)

    def adapt(self, builder: Builder, in_features: int, columns: Span, parts: Sequence[AdaptedPart]) -> None:
        """Notes that the product takes adapters of these modules, whose matrices have `in_features` columns."""
        spec = self.kernel.spec
        self.site = builder.add_site(
            in_features=in_features,
            columns=columns,
            out_features=spec.out_features,
            parts=tuple(parts),
            dtype=spec.dtype,
            gains=builder.takes("magnitudes") and self._plain,
            biased=spec.bias,
        )

    def product(self, x: Tensor, adapters: StepAdapters | None) -> Tensor:
        """This rank's part of the product, with the adapters of the step's tokens."""
        return adapted(self.ops, self.site, x, self.kernel.apply(x, self.packed), adapters)

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
        """Plain values where adapters read them too."""
        return self.kernel.accepts if self.site is None else ActFormat(dtype=self.kernel.spec.dtype)


@dataclass(frozen=True, slots=True)
class PutPart:
    """weights.matrix.Put for one part of a product."""

    layer: _PackedLinear
    part: str

    def __call__(self, kind: str, tensor: Tensor, row: int = 0) -> None:
        part = f"{self.part}.{kind}" if kind else self.part
        self.layer.kernel.load(self.layer.packed, part, tensor, row=row)


def _stored(builder: Builder, name: str, in_features: int) -> Stored:
    return Stored(builder.scheme([name], in_features), builder.formats.ordered(name))


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
        adapts: bool = False,
    ) -> None:
        """`epilogue` is taken where the device has it for this product: `has_epilogue` tells. `adapts`: whoever calls
        the product gives it the step's adapters."""
        adapts = adapts and builder.takes("products")
        parts, spans, offset = [], [], 0
        for each in projections:
            span, _ = builder.held((each.rows, in_features), each.placed, f"rows of {each.name}")
            parts.append(LinearPart(name=each.part, offset=offset, rows=span.count, placed=each.placed))
            spans.append(span.after(each.first))
            offset += span.count
        stored = [_stored(builder, projection.name, in_features) for projection in projections]
        # An adapter is added before the activation.
        fused = (
            not any(each.scheme for each in stored)
            and not adapts
            and epilogue in builder.platform.capabilities.epilogues
        )
        spec = LinearSpec(
            in_features=in_features,
            out_features=offset,
            parts=tuple(parts),
            dtype=builder.dtype,
            bias=bias,
            epilogue=epilogue if fused else None,
        )
        super().__init__(builder, spec, stored)
        self.has_epilogue = fused
        if adapts:
            adapted = [
                AdaptedPart(module=each.name, rows=each.of or each.rows, held=span, offset=part.offset)
                for each, span, part in zip(projections, spans, parts, strict=True)
            ]
            self.adapt(builder, in_features, Span(0, in_features), adapted)
        for projection, span, held in zip(projections, spans, stored, strict=True):
            name, rows = projection.name, projection.of or projection.rows
            builder.formats.want(
                builder.weights,
                Matrix(
                    name=name,
                    shape=(rows, in_features),
                    rows=span,
                    columns=Span(0, in_features),
                    scheme=held.scheme,
                    put=self.put(projection.part),
                    takes_order=True,
                ),
            )
            if bias:
                self.want_bias(builder, name, rows, span, projection.part)

    def __call__(self, x: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        return self.product(x, adapters)


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
        adapts: bool = False,
    ) -> None:
        """`placed` divides the matrix [out_features, in_features] by columns, along tp. `adapts`: whoever calls the
        product gives it the step's adapters."""
        stored = _stored(builder, name, in_features)
        self.communicator = builder.mesh.axis("tp")
        bias_here = bias and self.communicator.rank == 0  # the sum over ranks must hold it once
        rows, columns = builder.held((out_features, in_features), placed, f"columns of {name}")
        spec = LinearSpec(
            in_features=columns.count,
            out_features=out_features,
            parts=(LinearPart(name="all", offset=0, rows=out_features, placed=placed),),
            dtype=builder.dtype,
            bias=bias_here,
        )
        super().__init__(builder, spec, [stored])
        if adapts and builder.takes("products"):
            self.adapt(
                builder, in_features, columns, [AdaptedPart(module=name, rows=out_features, held=rows, offset=0)]
            )
        builder.formats.want(
            builder.weights,
            Matrix(
                name=name,
                shape=(out_features, in_features),
                rows=rows,
                columns=columns,
                scheme=stored.scheme,
                put=self.put("all"),
                takes_order=True,
            ),
        )
        if bias_here:
            self.want_bias(builder, name, out_features, rows, "all")
        elif bias:
            builder.weights.want(f"{name}.bias", (out_features,), lambda view: None)

    def __call__(self, x: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        if adapters is not None and self.site is not None:  # the sum over ranks holds what each one's columns add
            return self.communicator.all_reduce(self.product(x, adapters))
        return self.ops.matmul_reduce(x=x, kernel=self.kernel, packed=self.packed, communicator=self.communicator)


class ReplicatedLinear(ColumnParallelLinear):
    """The whole product on every rank: routers, and projections that do not split."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        in_features: int,
        out_features: int,
        bias: bool = False,
        adapts: bool = False,
    ) -> None:
        projection = Projection("all", name, out_features)
        super().__init__(builder, in_features=in_features, projections=[projection], bias=bias, adapts=adapts)
