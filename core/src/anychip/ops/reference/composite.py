"""Reference of the composite ops: each is made of the single ops of a table, so that an override of a single op serves
there too."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from anychip.plugin_api import ActFormat, Communicator, LinearKernel, QKNorm, Rope


class SingleOps(Protocol):
    """What composite ops are made of; see plugin_api.Ops."""

    def rms_norm(self, *, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor: ...
    def rotary(self, *, x: Tensor, positions: Tensor, rope: Rope) -> Tensor: ...
    def gated_activation(self, *, gate_up: Tensor, activation: str) -> Tensor: ...


class CompositeOps:
    def __init__(self, ops: SingleOps) -> None:
        self._ops = ops

    def qkv_norm_rope(
        self, *, q: Tensor, k: Tensor | None, positions: Tensor, rope: Rope | None, qk_norm: QKNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        ops = self._ops
        if qk_norm is not None:
            q = ops.rms_norm(x=q, weight=qk_norm.q_weight, eps=qk_norm.eps, unit_offset=qk_norm.unit_offset)
            if k is not None:
                k = ops.rms_norm(x=k, weight=qk_norm.k_weight, eps=qk_norm.eps, unit_offset=qk_norm.unit_offset)
        if rope is not None:
            q = ops.rotary(x=q, positions=positions, rope=rope)
            if k is not None:
                k = ops.rotary(x=k, positions=positions, rope=rope)
        return q, k

    def residual_norm_quant(
        self,
        *,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        unit_offset: bool = False,
        out_format: ActFormat | None = None,
    ) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        normed = self._ops.rms_norm(x=total, weight=weight, eps=eps, unit_offset=unit_offset)
        return _in_format(normed, out_format), total

    def gate_up_act_quant(self, *, gate_up: Tensor, activation: str, out_format: ActFormat | None = None) -> Tensor:
        return _in_format(self._ops.gated_activation(gate_up=gate_up, activation=activation), out_format)

    def matmul_reduce(self, *, x: Tensor, kernel: LinearKernel, packed: object, communicator: Communicator) -> Tensor:
        return communicator.all_reduce(kernel.apply(x, packed))


def _in_format(x: Tensor, out_format: ActFormat | None) -> Tensor:
    if out_format is not None and out_format.scheme is not None:
        raise ValueError(f"the reference produces no activations of scheme {out_format.scheme!r}")
    return x
