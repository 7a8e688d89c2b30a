"""Overrides of single and composite ops with the vendor's. What is not here runs on core's reference ops, which are
torch's own on this device: embedding, sampling and its masks and penalties, log-probabilities, soft caps.

Sources: the documents of npu_rms_norm, npu_add_rms_norm, npu_rotary_mul and npu_swiglu in the torch_npu wheel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import functional
from anychip.plugin_api import ActFormat, QKNorm, Rope, op_override
from anychip_ascend.generations import ROTARY, SWIGLU, Generation
from anychip_ascend.runtime import npu

_MOST_ROTARY = 895
_MOST_HEADS = 999
"""npu_rotary_mul: D < 896, N < 1000."""


class AscendOps:
    def __init__(self, generation: Generation) -> None:
        self._lacks = generation.lacks

    def overrides(self) -> Mapping[str, Callable[..., Any]]:
        """By op name; what the generation lacks is not among them."""
        served = [self.rms_norm, self.residual_norm_quant]
        served += [] if ROTARY in self._lacks else [self.rotary, self.qkv_norm_rope]
        served += [] if SWIGLU in self._lacks else [self.gated_activation]
        return {method.__name__: method for method in served}

    @op_override("rms_norm", version=1)
    def rms_norm(self, *, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
        if unit_offset or weight.dtype != x.dtype or not x.numel():
            # A weight that is added to one keeps bits that its own dtype has not: the reference adds in float32.
            return functional.rms_norm(x=x, weight=weight, eps=eps, unit_offset=unit_offset)
        normed: Tensor = npu.npu_rms_norm(x.contiguous(), weight, eps)[0]
        return normed

    @op_override("residual_norm_quant", version=1)
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
        assert out_format is None or out_format.scheme is None, "products here take plain activations"
        if residual is None:
            return self.rms_norm(x=x, weight=weight, eps=eps, unit_offset=unit_offset), x
        if unit_offset or weight.dtype != x.dtype or not x.numel():
            total = x + residual
            return self.rms_norm(x=total, weight=weight, eps=eps, unit_offset=unit_offset), total
        normed, _, total = npu.npu_add_rms_norm(x.contiguous(), residual.contiguous(), weight, eps)
        return normed, total

    @op_override("rotary", version=1)
    def rotary(self, *, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
        return self._turned(x, *self._tables(positions, rope), rope)

    @op_override("qkv_norm_rope", version=1)
    def qkv_norm_rope(
        self, *, q: Tensor, k: Tensor | None, positions: Tensor, rope: Rope | None, qk_norm: QKNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        if qk_norm is not None:
            shared = {"eps": qk_norm.eps, "unit_offset": qk_norm.unit_offset}
            q = self.rms_norm(x=q, weight=qk_norm.q_weight, **shared)
            k = None if k is None else self.rms_norm(x=k, weight=qk_norm.k_weight, **shared)
        if rope is not None:
            tables = self._tables(positions, rope)  # for both
            q = self._turned(q, *tables, rope)
            k = None if k is None else self._turned(k, *tables, rope)
        return q, k

    def _tables(self, positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin [1, num_tokens, 1, rotary_dim] float32, as the op multiplies them: halves repeat each frequency
        whole, neighbours one by one."""

        def spread(table: Tensor) -> Tensor:
            picked = table[positions]
            wide = picked.repeat_interleave(2, dim=-1) if rope.interleaved else torch.cat((picked, picked), dim=-1)
            return wide[None, :, None]

        return spread(rope.cos), spread(rope.sin)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor, rope: Rope) -> Tensor:
        """In float32: the op wants all three in one dtype, and angles in bfloat16 would be wrong by 2^-9."""
        heads, dim = x.shape[-2], rope.rotary_dim
        assert dim <= _MOST_ROTARY and heads <= _MOST_HEADS, f"{heads} heads, {dim} turned dimensions"
        if not x.numel():
            return x
        mode = "interleave" if rope.interleaved else "half"
        wide = x[None, ..., :dim].float().contiguous()
        turned: Tensor = npu.npu_rotary_mul(wide, cos, sin, mode)[0].to(x.dtype)
        return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)

    @op_override("gated_activation", version=1)
    def gated_activation(self, *, gate_up: Tensor, activation: str) -> Tensor:
        if activation != "silu" or not gate_up.numel():
            return functional.gated_activation(gate_up=gate_up, activation=activation)
        result: Tensor = npu.npu_swiglu(gate_up.contiguous(), -1)
        return result
