"""LFM2's short convolution: over the product of two projections, and gated by a third."""

from __future__ import annotations

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.causal_conv import CausalConv
from anychip.layers.held_rows import Stretch
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.plugin_api import ActFormat, ForwardContext, Sharded, StateBackend, StateSpec

_BY_CHANNEL = (Sharded(dim=0),)


class ShortConv:
    """out(c * conv(b * x)), for the three parts b, c and x of one projection."""

    def __init__(
        self, builder: Builder, *, name: str, index: int, spec: StateSpec, hidden_size: int, bias: bool
    ) -> None:
        projections = [
            Projection(part, f"{name}.in_proj", hidden_size, _BY_CHANNEL, first=at * hidden_size, of=3 * hidden_size)
            for at, part in enumerate(("b", "c", "x"))
        ]
        self.inputs = ColumnParallelLinear(builder, in_features=hidden_size, projections=projections, bias=bias)
        self.conv = CausalConv(
            builder,
            name=f"{name}.conv",
            index=index,
            spec=spec,
            stretches=[Stretch(hidden_size, _BY_CHANNEL)],
            bias=bias,
            activation=False,
        )
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.out_proj",
            in_features=hidden_size,
            placed=(Sharded(dim=1),),
            out_features=hidden_size,
            bias=bias,
        )

    @property
    def backends(self) -> list[StateBackend]:
        return [self.conv.backend]

    @property
    def accepts(self) -> ActFormat:
        return self.inputs.accepts

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        b, c, x = self.inputs(hidden).chunk(3, dim=-1)
        return self.output(c * self.conv(b * x, context))
