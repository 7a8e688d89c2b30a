"""Which kernel serves a layer of experts on which generation, and why. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anychip.plugin_api import MoESpec
from anychip_ascend.generations import MOE_ROUTING, Generation

_MOST_EXPERTS = 1023
"""Of one grouped product, beside the one that stands for experts of other ranks."""

_MOST_SIDE = 65535
_MOST_TOP_K = 512
_SCALES = ("channel", "tensor")
_GATING_STEP, _LEAST_GROUP, _MOST_GATED = 32, 2, 2048
"""npu_moe_gating_top_k: groups of more than two experts, which filled up to 32s are 2048 at most."""


@dataclass(frozen=True, slots=True)
class MoEChoice:
    """`widened`: dequantized at load, for the grouped product of plain weights."""

    op: Literal["npu_grouped_matmul", "widened", "reference"]
    why: str


def choose_moe(spec: MoESpec, generation: Generation) -> MoEChoice:
    if MOE_ROUTING in generation.lacks:
        return MoEChoice("reference", f"{generation.name} has no {MOE_ROUTING}")
    if spec.num_held > _MOST_EXPERTS or spec.top_k > _MOST_TOP_K:
        most = f"{_MOST_EXPERTS} and {_MOST_TOP_K} at most"
        return MoEChoice("reference", f"{spec.num_held} experts, {spec.top_k} to a token: {most}")
    if max(spec.hidden_size, 2 * spec.intermediate_size) > _MOST_SIDE:
        return MoEChoice("reference", f"a matrix longer than {_MOST_SIDE}")
    if spec.scheme is None:
        return MoEChoice("npu_grouped_matmul", "plain weights, one product for all experts")
    if spec.scheme.activations == "plain":
        return MoEChoice("widened", f"{spec.scheme.name} experts: dequantized once, as they are loaded")
    if spec.scheme.name != "int8-w8a8" or spec.scheme.activations != "token" or spec.scheme.scales not in _SCALES:
        return MoEChoice("reference", f"{spec.scheme.name} experts: the op rounds to int8, by row and channel")
    if spec.bias or spec.dtype == "float32":
        return MoEChoice("reference", f"int8 experts of {spec.dtype}" + (" with a bias" if spec.bias else ""))
    return MoEChoice("npu_grouped_matmul", "int8, a scale for each row and channel")


def choose_gating(spec: MoESpec) -> Literal["softmax", "general", "reference"]:
    """softmax: npu_moe_gating_top_k_softmax, over all experts, then the best k. general: npu_moe_gating_top_k, which
    has groups, a correction for picking, and sigmoid; it divides sigmoid weights by their sum, so a router that does
    not stays on the reference."""
    if spec.scoring == "softmax" and spec.num_groups == 1 and not spec.router_bias:
        return "softmax"
    size = spec.num_experts // spec.num_groups
    padded = -(-size // _GATING_STEP) * _GATING_STEP * spec.num_groups
    grouped = spec.num_groups == 1 or (size > _LEAST_GROUP and padded <= _MOST_GATED)
    picked = spec.top_k <= size * spec.top_groups and spec.num_experts <= _MOST_GATED
    divides = spec.scoring == "softmax" or spec.renormalize
    return "general" if grouped and picked and divides else "reference"
