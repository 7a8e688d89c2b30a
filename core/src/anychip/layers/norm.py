"""RMS norm, alone or fused with the residual sum before it, and over all heads at once; layer norm."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.layers.build import Builder
from anychip.plugin_api import ActFormat, Sharded, Span, WeightView

_FEATURES = (Sharded(dim=0),)


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


class WideQKNorm:
    """RMS norms over the queries and over the keys of all heads, which ranks divide: they add up their squares. `spans`
    are this rank's share of the `sizes` values of both. Where ranks repeat a head, all are repeated as often, so the
    mean over what the ranks hold is that over all heads."""

    placed_tensors = MappingProxyType({"q_weight": _FEATURES, "k_weight": _FEATURES})

    def __init__(self, builder: Builder, *, name: str, sizes: Sequence[int], spans: Sequence[Span], eps: float) -> None:
        self.ops = builder.ops
        self.communicator = builder.mesh.axis("tp")
        self.eps = eps
        self.q_weight, self.k_weight = (
            self._wanted(builder, f"{name}.{module}.weight", size, span)
            for module, size, span in zip(("q_norm", "k_norm"), sizes, spans, strict=True)
        )

    @staticmethod
    def _wanted(builder: Builder, name: str, size: int, span: Span) -> Tensor:
        held = builder.platform.empty((span.count,), builder.dtype, "weights")

        def load(view: WeightView) -> None:
            held.copy_(view.read(span.bounds))

        builder.weights.want(name, (size,), load)
        return held

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [num_tokens, heads, head_dim]."""
        flat, weights = (q.flatten(1), k.flatten(1)), (self.q_weight, self.k_weight)
        if self.communicator.size == 1:
            normed = [self.ops.rms_norm(x=x, weight=w, eps=self.eps) for x, w in zip(flat, weights, strict=True)]
        else:
            wide = [x.float() for x in flat]
            squares = torch.stack([x.pow(2).mean(dim=-1) for x in wide])  # [2, num_tokens]
            mean = self.communicator.all_reduce(squares) / self.communicator.size
            factors = (mean + self.eps).rsqrt().unsqueeze(-1)
            normed = [w * (x * f).to(q.dtype) for x, f, w in zip(wide, factors, weights, strict=True)]
        return normed[0].view(q.shape), normed[1].view(k.shape)


class LayerNorm:
    def __init__(self, builder: Builder, *, name: str, size: int, eps: float, bias: bool = True) -> None:
        self.eps = eps
        self.weight = self._wanted(builder, f"{name}.weight", size)
        self.bias = self._wanted(builder, f"{name}.bias", size) if bias else None

    @staticmethod
    def _wanted(builder: Builder, name: str, size: int) -> Tensor:
        held = builder.platform.empty((size,), builder.dtype, "weights")

        def load(view: WeightView) -> None:
            held.copy_(view.read((0, size)))

        builder.weights.want(name, (size,), load)
        return held

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def with_residual(
        self, x: Tensor, residual: Tensor | None, out_format: ActFormat | None = None
    ) -> tuple[Tensor, Tensor]:
        """As RMSNorm's, in plain values, which every product takes."""
        residual = x if residual is None else x + residual
        return self(residual), residual
