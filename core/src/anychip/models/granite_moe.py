"""Granite 3 MoE: Granite with a mixture of experts, whose matrices the checkpoint stacks by layer
(config.json: GraniteMoeForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.layers.build import Builder
from anychip.layers.mlp import PutExpert, SparseMoE
from anychip.models.granite import Granite
from anychip.weights.matrix import Matrix, MatrixStack, Span, StackPiece


class GraniteMoE(Granite):
    def feed_forward(self, builder: Builder, index: int) -> SparseMoE:
        config = self.config
        spec = self.experts_spec(
            builder,
            num_experts=int(config.need("num_local_experts")),
            top_k=int(config.need("num_experts_per_tok")),
            intermediate_size=config.intermediate_size,
        )
        name, size = f"model.layers.{index}.block_sparse_moe", config.intermediate_size
        return LayerOfExperts(builder, name=name, spec=spec, intermediate_size=size, router="router.layer")


class LayerOfExperts(SparseMoE):
    """input_linear holds gate above up of every expert, [num_experts, 2 * intermediate_size, hidden_size], and
    output_linear down, [num_experts, hidden_size, intermediate_size]."""

    def modules(self, name: str, count: int, names: Sequence[str]) -> list[str]:
        layer = name.removesuffix(".experts")
        return [f"{layer}.input_linear", f"{layer}.output_linear"]

    def want_experts(
        self, builder: Builder, name: str, intermediate_size: int, span: Span, names: Sequence[str]
    ) -> None:
        count, hidden = self.spec.num_experts, Span(0, self.spec.hidden_size)
        wide, tall = (intermediate_size, hidden.count), (hidden.count, intermediate_size)

        def piece(part: str, first: int, shape: tuple[int, int], rows: Span, columns: Span) -> StackPiece:
            matrices = [
                Matrix(
                    name=f"{name}.{expert}.{part}",
                    shape=shape,
                    rows=rows,
                    columns=columns,
                    scheme=self.spec.scheme,
                    put=PutExpert(self, place, part),
                )
                for place, expert in enumerate(range(*self.held.bounds))
            ]
            return StackPiece(slice(*rows.after(first).bounds), matrices)

        gate_up = (piece("gate", 0, wide, span, hidden), piece("up", intermediate_size, wide, span, hidden))
        down = (piece("down", 0, tall, hidden, span),)
        for module, shape, pieces in zip(
            self.modules(name, count, names), ((2 * wide[0], wide[1]), tall), (gate_up, down), strict=True
        ):
            stack = MatrixStack(
                name=f"{module}.weight", count=count, held=self.held, shape=shape, pieces=pieces, outputs_first=True
            )
            builder.formats.want_stack(builder.weights, stack)
