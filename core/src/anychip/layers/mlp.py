"""Feed-forward blocks: gated, and a mixture of gated experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, ReplicatedLinear, RowParallelLinear
from anychip.plugin_api import ActFormat, MoESpec
from anychip.weights.matrix import Matrix, Span


class GatedMLP:
    """down(act(gate(x)) * up(x)), gate and up in one product. `fused_gate_up` names the one checkpoint matrix that
    holds both, where a family has that."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        bias: bool = False,
        fused_gate_up: str | None = None,
    ) -> None:
        span = builder.split(intermediate_size, "intermediate features")
        if fused_gate_up is None:
            projections = [
                Projection("gate", f"{name}.gate_proj", intermediate_size, span),
                Projection("up", f"{name}.up_proj", intermediate_size, span),
            ]
        else:
            fused, rows = f"{name}.{fused_gate_up}", 2 * intermediate_size
            projections = [
                Projection("gate", fused, rows, span),
                Projection("up", fused, rows, span.after(intermediate_size)),
            ]
        plain = builder.scheme([f"{name}.down_proj"], intermediate_size) is None
        self.gate_up = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=projections,
            bias=bias,
            epilogue=activation if plain else None,  # it has no other format
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
        hidden = self.gate_up(x)
        if not self.gate_up.has_epilogue:
            hidden = self.ops.gate_up_act_quant(
                gate_up=hidden, activation=self.activation, out_format=self.down.accepts
            )
        return self.down(hidden)


class SparseMoE:
    """Every rank holds every expert's share of the intermediate features; outputs are summed over ranks.

    `names` are those of the expert's gate, up and down matrices.
    """

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        spec: MoESpec,
        intermediate_size: int,
        router: str = "gate",
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        router_bias: bool = False,
    ) -> None:
        span = builder.split(intermediate_size, "expert features")
        assert span.count == spec.intermediate_size
        self.communicator = builder.shard.communicator
        self.router = ReplicatedLinear(
            replace(builder, formats=builder.formats.for_router()),
            name=f"{name}.{router}",
            in_features=spec.hidden_size,
            out_features=spec.num_experts,
            bias=router_bias,
        )
        # One scheme for gate, up and down: its groups divide the features of both.
        modules = self.modules(f"{name}.experts", spec.num_experts, names)
        scheme = builder.scheme(modules, gcd(spec.hidden_size, intermediate_size))
        self.spec = replace(spec, scheme=scheme)
        self.kernel = builder.platform.moe(self.spec)
        self.packed = self.kernel.begin()
        self.want_experts(builder, f"{name}.experts", intermediate_size, span, names)
        builder.weights.finishers.append(self._finish)

    def modules(self, name: str, count: int, names: tuple[str, str, str]) -> list[str]:
        """What a checkpoint calls the matrices of `count` experts."""
        return [f"{name}.{expert}.{part}" for expert in range(count) for part in names]

    def want_experts(
        self, builder: Builder, name: str, intermediate_size: int, span: Span, names: tuple[str, str, str]
    ) -> None:
        """Asks for every expert's matrices; a family that stacks experts in one tensor overrides this."""
        spec = self.spec
        hidden = Span(0, spec.hidden_size)
        wide, tall = (intermediate_size, spec.hidden_size), (spec.hidden_size, intermediate_size)
        for expert in range(spec.num_experts):
            for part, module in zip(("gate", "up", "down"), names, strict=True):
                down = part == "down"
                builder.formats.want(
                    builder.weights,
                    Matrix(
                        name=f"{name}.{expert}.{module}",
                        shape=tall if down else wide,
                        rows=hidden if down else span,
                        columns=span if down else hidden,
                        scheme=spec.scheme,
                        put=PutExpert(self, expert, part),
                    ),
                )

    def _finish(self) -> None:
        self.packed = self.kernel.finish(self.packed)

    @property
    def accepts(self) -> ActFormat:
        return self.router.accepts

    def __call__(self, x: Tensor) -> Tensor:
        return self.communicator.all_reduce(self.kernel.apply(x, self.router(x), self.packed))


@dataclass(frozen=True, slots=True)
class PutExpert:
    """weights.matrix.Put for one part of an expert."""

    layer: SparseMoE
    expert: int
    part: str

    def __call__(self, kind: str, tensor: Tensor, row: int = 0) -> None:
        part = f"{self.part}.{kind}" if kind else self.part
        self.layer.kernel.load(self.layer.packed, self.expert, part, tensor, row=row)
