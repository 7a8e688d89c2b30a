"""A feed-forward block without a gate."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.plugin_api import ActFormat, ForwardContext, Sharded, StepAdapters


class PlainMLP:
    """down(act(up(x))). `names` are the checkpoint's for both matrices."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Tensor], Tensor],
        bias: bool = False,
        names: tuple[str, str] = ("up_proj", "down_proj"),
    ) -> None:
        placed = (Sharded(dim=0),)
        up, down = (f"{name}.{part}" for part in names)
        self.activation = activation
        self.up = ColumnParallelLinear(
            builder,
            in_features=hidden_size,
            projections=[Projection("up", up, intermediate_size, placed)],
            bias=bias,
            adapts=True,
        )
        self.down = RowParallelLinear(
            builder,
            name=down,
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
        return self.activation(self.up(x, adapters))


def squared_relu(x: Tensor) -> Tensor:
    """The square of what is above zero."""
    return x.relu().square()
