"""Feed-forward blocks: gated, and a mixture of gated experts."""

from __future__ import annotations

from torch import Tensor

from anychip.layers.build import Builder, Span
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.plugin_api import ActFormat, LinearPart, LinearSpec, MoESpec, WeightView


class GatedMLP:
    """down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        bias: bool = False,
    ) -> None:
        span = builder.split(intermediate_size, "intermediate features")
        self.gate_up = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=[
                Projection("gate", f"{name}.gate_proj", intermediate_size, span),
                Projection("up", f"{name}.up_proj", intermediate_size, span),
            ],
            bias=bias,
        )
        self.down = RowParallelLinear(
            builder,
            name=f"{name}.down_proj",
            in_features=intermediate_size,
            span=span,
            out_features=hidden_size,
            bias=bias,
        )
        self.activation = activation
        self.ops = builder.ops

    @property
    def accepts(self) -> ActFormat:
        return self.gate_up.accepts

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(
            self.ops.gate_up_act_quant(
                gate_up=self.gate_up(x), activation=self.activation, out_format=self.down.accepts
            )
        )


class SparseMoE:
    """Every rank holds every expert's share of the intermediate features; outputs are summed over ranks."""

    def __init__(self, builder: Builder, *, name: str, spec: MoESpec, intermediate_size: int) -> None:
        span = builder.split(intermediate_size, "expert features")
        assert span.count == spec.intermediate_size
        self.communicator = builder.shard.communicator
        self.router = builder.platform.linear(
            LinearSpec(
                in_features=spec.hidden_size,
                out_features=spec.num_experts,
                parts=(LinearPart(name="all", offset=0, rows=spec.num_experts),),
                dtype=builder.dtype,
            )
        )
        self.router_packed = self.router.begin()
        self.kernel = builder.platform.moe(spec)
        self.packed = self.kernel.begin()
        shape = (spec.num_experts, spec.hidden_size)

        def load_router(view: WeightView) -> None:
            self.router.load(self.router_packed, "all", view.read((0, shape[0]), (0, shape[1])))

        builder.weights.want(f"{name}.gate.weight", shape, load_router)
        for expert in range(spec.num_experts):
            self._want_expert(builder, f"{name}.experts.{expert}", expert, spec.hidden_size, intermediate_size, span)
        builder.weights.finishers.append(self._finish)

    def _want_expert(
        self, builder: Builder, name: str, expert: int, hidden_size: int, intermediate_size: int, span: Span
    ) -> None:
        wide, tall = (intermediate_size, hidden_size), (hidden_size, intermediate_size)

        def load_gate(view: WeightView) -> None:
            self.kernel.load(self.packed, expert, "gate", view.read(span.bounds, (0, hidden_size)))

        def load_up(view: WeightView) -> None:
            self.kernel.load(self.packed, expert, "up", view.read(span.bounds, (0, hidden_size)))

        def load_down(view: WeightView) -> None:
            self.kernel.load(self.packed, expert, "down", view.read((0, hidden_size), span.bounds))

        builder.weights.want(f"{name}.gate_proj.weight", wide, load_gate)
        builder.weights.want(f"{name}.up_proj.weight", wide, load_up)
        builder.weights.want(f"{name}.down_proj.weight", tall, load_down)

    def _finish(self) -> None:
        self.router_packed = self.router.finish(self.router_packed)
        self.packed = self.kernel.finish(self.packed)

    @property
    def accepts(self) -> ActFormat:
        return self.router.accepts

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.router.apply(x, self.router_packed)
        return self.communicator.all_reduce(self.kernel.apply(x, logits, self.packed))
