"""Faults of eight-bit activations and caches: scales that rows share, formats that nobody makes, storage used again."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.ops.reference import ExpertWeights
from anychip.ops.reference.linear import QuantizedWeights, ReferenceQuantizedLinear
from anychip.plugin_api import ActFormat, AttentionLayer, BatchView, LinearSpec, PartialAttention, Platform, Routing
from anychip_conformance.faulty.bad_rows import bad, shadow
from anychip_conformance.faulty.later import Scratch
from anychip_conformance.faulty.plain import InvariantMoE, PlainAttention
from anychip_conformance.faulty.registry import fault


@fault("linear-quantized-scale-of-the-batch", "linear", killed_by="linear.bad_rows_quantized.001")
class ScaleOfTheBatch(ReferenceQuantizedLinear):
    """Activations of all rows are brought to one scale before they are rounded."""

    def apply(self, x: Tensor, packed: QuantizedWeights, *, out: Tensor | None = None) -> Tensor:
        return super().apply(x + shadow(x).to(x.dtype), packed, out=out)


@fault("linear-quantized-in-one-buffer", "linear", killed_by="linear.kept_results_quantized.001")
class QuantizedInOneBuffer(ReferenceQuantizedLinear):
    """Products of one size share their storage."""

    def __init__(self, spec: LinearSpec, platform: Platform) -> None:
        super().__init__(spec, platform)
        self._scratch = Scratch()

    def apply(self, x: Tensor, packed: QuantizedWeights, *, out: Tensor | None = None) -> Tensor:
        return self._scratch(super().apply(x, packed, out=out))


@fault("linear-accepts-what-nobody-makes", "linear", killed_by="linear.fused_activations.001")
class AcceptsWhatNobodyMakes(ReferenceQuantizedLinear):
    """A kernel asks the ops before it for rounded activations, and none of them makes any."""

    @property
    def accepts(self) -> ActFormat:
        assert self.spec.scheme is not None
        return ActFormat(dtype=self.spec.dtype, scheme=self.spec.scheme.name)


@fault("moe-activations-of-two-bits", "moe", killed_by="moe.activations.011")
class ActivationsOfTwoBits(InvariantMoE):
    """Activations are rounded to a half of their row's largest."""

    def expert(self, x: Tensor, packed: ExpertWeights, expert: int) -> Tensor:
        unit = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / 2
        return super().expert((x / unit).round() * unit, packed, expert)


@fault("moe-quantized-scale-of-the-batch", "moe", killed_by="moe.bad_rows_quantized.001")
class ExpertsShareAScale(InvariantMoE):
    """All tokens of a step are brought to one scale."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        spoiled = x if self.spec.scheme is None else x + shadow(x).to(x.dtype)
        return super().experts(spoiled, routing, packed, expert_map=expert_map)


@fault("kv-encoded-by-the-batch", "attention", killed_by="attn.bad_rows_quantized.001")
class EncodedByTheBatch(PlainAttention):
    """Where a value of the step is no number, all of the step's are stored as zeros."""

    def encode(self, x: Tensor, scale: Tensor | None) -> Tensor:
        spoiled = self.spec.kv_dtype != self.spec.dtype and bool(bad(x).any())
        return super().encode(torch.zeros_like(x) if spoiled else x, scale)


@fault("lse-of-the-batch", "attention", killed_by="attn.bad_rows_lse.001")
class LseOfTheBatch(PlainAttention):
    """Log-sum-exps of all rows share one maximum."""

    def attend_with_lse(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> PartialAttention:
        found = super().attend_with_lse(q, cache, plan, layer, out=out)
        tokens = int(plan.query_start[-1])
        return PartialAttention(found.out, found.lse + shadow(q[:tokens]))
