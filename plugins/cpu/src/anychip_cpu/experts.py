"""A mixture of experts in two compiled calls: routing, and all experts with their activation and weighted sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from anychip.ops.reference import ReferenceMoE
from anychip.plugin_api import MoESpec, Platform, Routing
from anychip_cpu.native import Kernels, fields
from anychip_cpu.ops import ACTIVATIONS, CODES, rows_of
from anychip_cpu.packing import PANEL, Panels, round_up

_HALF = PANEL // 2
"""Columns of gate, and of up, in a panel that holds both."""


@dataclass(slots=True)
class PackedExperts:
    gate_up: Panels
    down: Panels
    gate_up_bias: Tensor | None  # [num_experts, padded outputs] float32, in the panels' order
    down_bias: Tensor | None  # [num_experts, padded hidden_size] float32
    described: bytes = b""
    """kernels/moe_types.h's Experts, once they are finished."""
    expert_ids: Tensor | None = None
    """[local experts] the expert of `gate_up` and `down` that each is, after `remap`."""


class CpuMoE(ReferenceMoE):
    """Routing within groups of experts is the reference's."""

    def __init__(self, spec: MoESpec, platform: Platform, kernels: Kernels, name: str) -> None:
        super().__init__(spec, platform)
        self.name = f"cpu-{name}"
        self._kernels = kernels

    # -- weights ------------------------------------------------------------------------------------------

    def begin(self) -> PackedExperts:
        s = self.spec
        wide = 2 * round_up(s.intermediate_size, _HALF)
        gate_up = Panels.allocate(self._kernels, wide, s.hidden_size, s.dtype, s.scheme, count=s.num_held)
        down = Panels.allocate(self._kernels, s.hidden_size, s.intermediate_size, s.dtype, s.scheme, count=s.num_held)
        return PackedExperts(
            gate_up,
            down,
            torch.zeros(s.num_held, gate_up.outputs) if s.bias else None,
            torch.zeros(s.num_held, down.outputs) if s.bias else None,
        )

    def finish(self, packed: PackedExperts) -> PackedExperts:
        s, gate_up, down = self.spec, packed.gate_up, packed.down
        packed.described = gate_up.described() + down.described() + fields(
            s.num_held, s.hidden_size, s.intermediate_size, gate_up.values.shape[1], down.values.shape[1],
            *(4 * [0] if s.scheme is None else _strides(gate_up, down)),
            0 if packed.gate_up_bias is None else packed.gate_up_bias.data_ptr(),
            0 if packed.down_bias is None else packed.down_bias.data_ptr(),
            ACTIVATIONS[s.activation],
        )  # fmt: skip
        return packed

    def load(self, packed: PackedExperts, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        name, _, kind = part.partition(".")
        s = self.spec
        down = name == "down"
        rows = s.hidden_size if down else s.intermediate_size
        span, lane = (PANEL, 0) if down else (_HALF, _HALF if name == "up" else 0)
        if kind == "bias":
            bias = packed.down_bias if down else packed.gate_up_bias
            assert bias is not None, f"{part}: the spec has no bias"
            at = torch.arange(rows)
            bias[expert, at // span * PANEL + lane + at % span] = tensor.float()
        else:
            panels = packed.down if down else packed.gate_up
            panels.put(kind, tensor, slice(0, rows), index=expert, row=row, lane=lane, span=span)

    def expert_tensors(self, packed: PackedExperts, expert: int) -> list[Tensor]:
        rows = [*packed.gate_up.of_matrix(expert), *packed.down.of_matrix(expert)]
        return rows + [bias[expert] for bias in (packed.gate_up_bias, packed.down_bias) if bias is not None]

    def remap(self, packed: PackedExperts, expert_map: Tensor) -> PackedExperts:
        held = (expert_map >= 0).nonzero().squeeze(-1)
        return replace(packed, expert_ids=held[expert_map[held].argsort()])

    # -- a step -------------------------------------------------------------------------------------------

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        s = self.spec
        if s.num_groups > 1 or router_logits.dtype not in CODES:
            return super().route(router_logits, bias)
        logits, ld = rows_of(router_logits)
        rows = logits.shape[0]
        weights = torch.empty(rows, s.top_k)
        expert_ids = torch.empty(rows, s.top_k, dtype=torch.int64)
        wide = None if bias is None else bias.float().contiguous()
        self._kernels.route(
            CODES[logits.dtype], logits.data_ptr(), 0 if wide is None else wide.data_ptr(), rows,
            logits.shape[1], ld, s.top_k, s.scoring == "sigmoid", s.renormalize, float(s.router_scale),
            weights.data_ptr(), expert_ids.data_ptr(),
        )  # fmt: skip
        return Routing(weights, expert_ids)

    def experts(
        self, x: Tensor, routing: Routing, packed: PackedExperts, *, expert_map: Tensor | None = None
    ) -> Tensor:
        ids, weights = routing.expert_ids, routing.weights
        if expert_map is not None:
            ids = expert_map[ids.long()]
        if packed.expert_ids is not None:
            ids = torch.where(ids < 0, ids, packed.expert_ids[ids.long().clamp(0, len(packed.expert_ids) - 1)])
        ids, weights = ids.to(torch.int64).contiguous(), weights.to(torch.float32).contiguous()
        held, ldx = rows_of(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        self._kernels.moe(
            packed.described, CODES[x.dtype], held.data_ptr(), ldx, out.data_ptr(), ids.data_ptr(),
            weights.data_ptr(), x.shape[0], ids.shape[1],
        )  # fmt: skip
        return out

    @property
    def has_products(self) -> bool:
        return True

    def product(self, x: Tensor, expert_ids: Tensor, packed: PackedExperts, part: Literal["gate_up", "down"]) -> Tensor:
        """One product for each expert that has rows, as the panels lie; gate and up are taken apart behind it."""
        panels, bias = (packed.gate_up, packed.gate_up_bias) if part == "gate_up" else (packed.down, packed.down_bias)
        ids = expert_ids.long()
        if packed.expert_ids is not None:
            ids = torch.where(ids < 0, ids, packed.expert_ids[ids.clamp(min=0)])
        order, counts = ids.argsort(stable=True), torch.bincount(ids + 1, minlength=panels.count + 1).tolist()
        sorted_x, code = x[order].contiguous(), CODES[x.dtype]
        raw = x.new_zeros((len(x), panels.rows))
        begin = counts[0]
        for expert, count in enumerate(counts[1:]):
            if count:
                rows, out = sorted_x[begin:], raw[begin:]
                self._kernels.linear(
                    panels.described(expert), rows.data_ptr(), code, count, rows.stride(0), 0, out.data_ptr(), code,
                    out.stride(0), False,
                )  # fmt: skip
                if bias is not None:
                    out[:count] += bias[expert, : panels.rows]
                begin += count
        result = torch.empty_like(raw)
        result[order] = raw
        if part == "down":
            return result
        halves = result.view(len(x), -1, 2, _HALF)  # panels, each of gate and then up
        return halves.transpose(1, 2).reshape(len(x), 2, -1)[..., : self.spec.intermediate_size].flatten(1)


def _strides(*panels: Panels) -> list[int]:
    """From one expert's scales to the next's, in bytes; then from what multiplies them, in elements."""
    scales = [each.grouped["scale"].held for each in panels]
    upper = [each.grouped["super_scale"].held.stride(0) if "super_scale" in each.grouped else 0 for each in panels]
    return [held.stride(0) * held.element_size() for held in scales] + upper
