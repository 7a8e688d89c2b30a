"""RMS norm, alone or fused with the residual sum before it."""

from __future__ import annotations

from torch import Tensor

from anychip.layers.build import Builder
from anychip.plugin_api import ActFormat, WeightView


class RMSNorm:
    def __init__(self, builder: Builder, *, name: str, size: int, eps: float, unit_offset: bool = False) -> None:
        self.ops = builder.ops
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = builder.platform.empty((size,), builder.dtype, "weights")

        def load(view: WeightView) -> None:
            self.weight.copy_(view.read((0, size)))

        builder.weights.want(f"{name}.weight", (size,), load)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x=x, weight=self.weight, eps=self.eps, unit_offset=self.unit_offset)

    def with_residual(
        self, x: Tensor, residual: Tensor | None, out_format: ActFormat | None = None
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        return self.ops.residual_norm_quant(
            x=x,
            residual=residual,
            weight=self.weight,
            eps=self.eps,
            unit_offset=self.unit_offset,
            out_format=out_format,
        )
