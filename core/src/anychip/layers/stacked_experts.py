"""Experts that a checkpoint stacks in two tensors by layer: gate above up of every expert, [num_experts,
2 * intermediate_size, hidden_size], and down, [num_experts, hidden_size, intermediate_size]."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.layers.build import Builder
from anychip.layers.moe import PutExpert, SparseMoE
from anychip.weights.matrix import Matrix, MatrixStack, Span, StackPiece


class StackedExperts(SparseMoE):
    """Tensors of the experts themselves, without modules around them."""

    tensors = ("experts.gate_up_proj", "experts.down_proj")
    """Behind the layer's name."""

    def modules(self, name: str, count: int, names: Sequence[str]) -> list[str]:
        layer = name.removesuffix(".experts")
        return [f"{layer}.{tensor.removesuffix('.weight')}" for tensor in self.tensors]

    def want_experts(
        self, builder: Builder, name: str, intermediate_size: int, span: Span, names: Sequence[str]
    ) -> None:
        count, hidden = self.spec.num_experts, Span(0, self.spec.hidden_size)
        wide, tall = (intermediate_size, hidden.count), (hidden.count, intermediate_size)

        def piece(part: str, first: int, shape: tuple[int, int], rows: Span, columns: Span) -> StackPiece:
            return stack_piece(self, name, part, slice(*rows.after(first).bounds), shape=shape, cut=(rows, columns))

        gate_up = (piece("gate", 0, wide, span, hidden), piece("up", intermediate_size, wide, span, hidden))
        down = (piece("down", 0, tall, hidden, span),)
        layer = name.removesuffix(".experts")
        for tensor, shape, pieces in zip(self.tensors, ((2 * wide[0], wide[1]), tall), (gate_up, down), strict=True):
            stack = MatrixStack(
                name=f"{layer}.{tensor}", count=count, held=self.held, shape=shape, pieces=pieces, outputs_first=True
            )
            builder.formats.want_stack(builder.weights, stack)


class LayerOfExperts(StackedExperts):
    """As Granite names them."""

    tensors = ("input_linear.weight", "output_linear.weight")


def experts_as_stored(builder: Builder, name: str) -> type[SparseMoE]:
    """What reads the experts of layer `name` as this checkpoint has them: stacked, or each by itself."""
    return StackedExperts if builder.stored.has(f"{name}.{StackedExperts.tensors[0]}") else SparseMoE


def stack_piece(
    moe: SparseMoE, name: str, part: str, places: slice, *, shape: tuple[int, int], cut: tuple[Span, Span]
) -> StackPiece:
    """Gate, up or down of the experts that a rank holds: what stands in a stack's rows `places`. Of an expert's matrix
    of `shape` the rank takes the rows and columns of `cut`."""
    rows, columns = cut
    matrices = [
        Matrix(
            name=f"{name}.{expert}.{part}",
            shape=shape,
            rows=rows,
            columns=columns,
            scheme=moe.spec.scheme,
            put=PutExpert(moe, place, part),
        )
        for place, expert in enumerate(range(*moe.held.bounds))
    ]
    return StackPiece(places, matrices)
