"""The causal convolution that stands before a recurrence: of each channel by itself, over its last few inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.held_rows import HeldRows, Stretch
from anychip.plugin_api import ForwardContext, StateLayer, StateSpec, state_spec
from anychip.types import DType


def conv_spec(channels: int, width: int, dtype: DType) -> StateSpec:
    """`channels` are those of this rank."""
    return state_spec("causal_conv", dtype, channels=channels, past=width - 1)


class CausalConv:
    """`name` is the checkpoint's module, whose weight is [channels, 1, width]; `stretches` are its channels. Several
    names: each stretch has a module of its own. `index` is the place of `spec` among the model's."""

    def __init__(
        self,
        builder: Builder,
        *,
        name: str | Sequence[str],
        index: int,
        spec: StateSpec,
        stretches: Sequence[Stretch],
        bias: bool,
        activation: bool = True,
    ) -> None:
        width = spec.arrays[0].shape[0] + 1
        self.backend = builder.platform.state(spec)
        modules = [name] if isinstance(name, str) else name
        weight, offset = ([f"{module}.{part}" for module in modules] for part in ("weight", "bias"))
        self.weight = HeldRows(builder, weight if len(weight) > 1 else weight[0], stretches, inner=(1, width))
        weights = {"weight": self.weight.rows.squeeze(1)}
        if bias:
            self.bias = HeldRows(builder, offset if len(offset) > 1 else offset[0], stretches)
            weights["bias"] = self.bias.rows
        self.layer = StateLayer(index=index, ops=builder.ops, weights=weights)
        self.activation = activation

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor:
        """[num_tokens, channels], through silu where the layer has an activation."""
        result = context.advance(self.backend, self.layer, {"x": x})
        return F.silu(result) if self.activation else result
