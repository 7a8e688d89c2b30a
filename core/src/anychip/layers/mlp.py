"""Feed-forward blocks: gated, and a mixture of gated experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, ReplicatedLinear, RowParallelLinear
from anychip.plugin_api import ActFormat, ExpertParallel, MoESpec, Sharded, Span
from anychip.weights.matrix import Matrix

EXPERTS, FEATURES = Sharded(dim=0, axis="ep"), Sharded(dim=1)
"""How experts' matrices [num_experts, intermediate_size, hidden_size] are divided."""


class GatedMLP:
    """down(act(gate(x)) * up(x)), gate and up in one product. `fused_gate_up` names the one checkpoint matrix that
    holds both, where a family has that. `names` are those of gate, up and down, `multipliers` those of gate's values
    before the activation and of the result."""

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
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        multipliers: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        gate_name, up_name, down_name = (f"{name}.{part}" for part in names)
        placed = (Sharded(dim=0),)
        if fused_gate_up is None:
            projections = [
                Projection("gate", gate_name, intermediate_size, placed),
                Projection("up", up_name, intermediate_size, placed),
            ]
        else:
            fused, rows = f"{name}.{fused_gate_up}", 2 * intermediate_size
            projections = [
                Projection("gate", fused, intermediate_size, placed, of=rows),
                Projection("up", fused, intermediate_size, placed, first=intermediate_size, of=rows),
            ]
        plain = builder.scheme([down_name], intermediate_size) is None and multipliers[0] == 1.0
        self.gate_up = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=projections,
            bias=bias,
            epilogue=activation if plain else None,  # it has no other format, and multiplies nothing
        )
        self.down = RowParallelLinear(
            builder,
            name=down_name,
            in_features=intermediate_size,
            placed=(Sharded(dim=1),),
            out_features=hidden_size,
            bias=bias,
        )
        self.activation = activation
        self.multipliers = multipliers
        self.ops = builder.ops

    @property
    def accepts(self) -> ActFormat:
        return self.gate_up.accepts

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self.gate_up(x)
        of_gate, of_result = self.multipliers
        if of_gate != 1.0:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = torch.cat((gate * of_gate, up), dim=-1)
        if not self.gate_up.has_epilogue:
            hidden = self.ops.gate_up_act_quant(
                gate_up=hidden, activation=self.activation, out_format=self.down.accepts
            )
        result = self.down(hidden)
        return result if of_result == 1.0 else result * of_result


class SparseMoE:
    """A rank holds its share of the experts along ep, and of each its share of the intermediate features along tp;
    outputs are summed over both.

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
        placed = (EXPERTS, FEATURES)
        extents = (spec.num_experts, intermediate_size, spec.hidden_size)
        self.held, span, _ = builder.held(extents, placed, f"experts or their features of {name}")
        assert span.count == spec.intermediate_size
        self.communicator = builder.mesh.axis("tp")
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
        self.spec = replace(spec, scheme=scheme, placed=placed)
        self.ep: ExpertParallel | None = None
        self.expert_map: Tensor | None = None
        if builder.mesh.shape.size_of("ep") > 1:
            self.spec = replace(self.spec, num_local_experts=self.held.count)
            self.ep = ExpertParallel(communicator=builder.mesh.axis("ep"), num_local_experts=self.held.count)
            self.expert_map = self._expert_map(builder)
            self._leave_out_others(builder, f"{name}.experts")
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
        """Asks for the matrices of the experts that this rank holds; a family that stacks experts in one tensor
        overrides this."""
        spec = self.spec
        hidden = Span(0, spec.hidden_size)
        wide, tall = (intermediate_size, spec.hidden_size), (spec.hidden_size, intermediate_size)
        for place, expert in enumerate(range(*self.held.bounds)):
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
                        put=PutExpert(self, place, part),
                    ),
                )

    def _expert_map(self, builder: Builder) -> Tensor:
        """[num_experts]: an expert's place among those held here, -1 for one that is elsewhere."""
        places = torch.full((self.spec.num_experts,), -1)
        places[slice(*self.held.bounds)] = torch.arange(self.held.count)
        return builder.platform.empty(tuple(places.shape), "int64", "weights").copy_(places)

    def _leave_out_others(self, builder: Builder, name: str) -> None:
        """The checkpoint has them, and other ranks ask for them."""
        here = range(*self.held.bounds)
        builder.weights.elsewhere += tuple(f"{name}.{e}." for e in range(self.spec.num_experts) if e not in here)

    def _finish(self) -> None:
        self.packed = self.kernel.finish(self.packed)

    @property
    def accepts(self) -> ActFormat:
        return self.router.accepts

    def __call__(self, x: Tensor) -> Tensor:
        partial = self.kernel.apply(x, self.router(x), self.packed, ep=self.ep, expert_map=self.expert_map)
        return self.communicator.all_reduce(partial)


@dataclass(frozen=True, slots=True)
class PutExpert:
    """weights.matrix.Put for one part of an expert, which is counted among those of this rank."""

    layer: SparseMoE
    expert: int
    part: str

    def __call__(self, kind: str, tensor: Tensor, row: int = 0) -> None:
        part = f"{self.part}.{kind}" if kind else self.part
        self.layer.kernel.load(self.layer.packed, self.expert, part, tensor, row=row)
