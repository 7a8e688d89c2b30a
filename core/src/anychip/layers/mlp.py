"""The gated feed-forward block."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.plugin_api import ActFormat, ForwardContext, Sharded, StepAdapters


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
            adapts=True,
        )
        self.down = RowParallelLinear(
            builder,
            name=down_name,
            in_features=intermediate_size,
            placed=(Sharded(dim=1),),
            out_features=hidden_size,
            bias=bias,
            adapts=True,
        )
        self.activation = activation
        self.multipliers = multipliers
        self.ops = builder.ops

    @property
    def accepts(self) -> ActFormat:
        return self.gate_up.accepts

    def __call__(self, x: Tensor, context: ForwardContext | None) -> Tensor:
        adapters = None if context is None else context.adapters
        return self._multiplied(self.down(self._inner(x, adapters), adapters))

    def partial(self, x: Tensor, adapters: StepAdapters | None) -> Tensor:
        """This rank's part of the sum over ranks, for who adds it to another part."""
        return self._multiplied(self.down.product(self._inner(x, adapters), adapters))

    def _inner(self, x: Tensor, adapters: StepAdapters | None) -> Tensor:
        hidden, of_gate = self.gate_up(x, adapters), self.multipliers[0]
        if of_gate != 1.0:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = torch.cat((gate * of_gate, up), dim=-1)
        if self.gate_up.has_epilogue:
            return hidden
        return self.ops.gate_up_act_quant(gate_up=hidden, activation=self.activation, out_format=self.down.accepts)

    def _multiplied(self, result: Tensor) -> Tensor:
        of_result = self.multipliers[1]
        return result if of_result == 1.0 else result * of_result
