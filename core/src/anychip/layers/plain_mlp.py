"""A feed-forward block without a gate, whose activation is the square of what is above zero."""

from __future__ import annotations

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.plugin_api import ActFormat, ForwardContext, Sharded, StepAdapters


class SquaredReluMLP:
    """down(max(up(x), 0) ** 2)."""

    def __init__(
        self, builder: Builder, *, name: str, hidden_size: int, intermediate_size: int, bias: bool = False
    ) -> None:
        placed = (Sharded(dim=0),)
        self.up = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=[Projection("up", f"{name}.up_proj", intermediate_size, placed)],
            bias=bias,
            adapts=True,
        )
        self.down = RowParallelLinear(
            builder,
            name=f"{name}.down_proj",
            in_features=intermediate_size,
            placed=(Sharded(dim=1),),
            out_features=hidden_size,
            bias=bias,
            adapts=True,
        )

    @property
    def accepts(self) -> ActFormat:
        return self.up.accepts

    def __call__(self, x: Tensor, context: ForwardContext | None) -> Tensor:
        adapters = None if context is None else context.adapters
        return self.down(self._inner(x, adapters), adapters)

    def partial(self, x: Tensor, adapters: StepAdapters | None) -> Tensor:
        """This rank's part of the sum over ranks, for who adds it to another part."""
        return self.down.product(self._inner(x, adapters), adapters)

    def _inner(self, x: Tensor, adapters: StepAdapters | None) -> Tensor:
        return self.up(x, adapters).relu().square()
