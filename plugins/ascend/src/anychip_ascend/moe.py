"""Mixture of experts through the vendor's ops: routed, sorted by expert, two grouped products, and summed up by token.

Sources: the documents of npu_moe_gating_top_k_softmax, npu_moe_init_routing_v2, npu_grouped_matmul and
npu_moe_token_unpermute in the torch_npu wheel; aclnnGroupedMatmulV5.md, which lets groups end before the last row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import ReferenceMoE, WidenedMoE, can_widen, functional
from anychip.ops.reference.moe import ExpertWeights
from anychip.plugin_api import FusedMoE, MoESpec, Platform, Routing
from anychip_ascend.generations import Generation
from anychip_ascend.graph import NpuGraphs
from anychip_ascend.moe_choice import choose_gating, choose_moe
from anychip_ascend.runtime import TYPE_NUMBERS, npu

_ONE_TENSOR, _ROWS_IN_GROUPS = 2, 0
"""split_item and group_type of npu_grouped_matmul: one matrix comes out, rows are what groups divide."""

_SOFTMAX, _SIGMOID = 0, 1
"""norm_type of npu_moe_gating_top_k."""

_BEST, _TWO_BEST = 0, 1
"""group_select_mode: a group counts by its best expert, or by the sum of its two best."""

_ENDS, _COUNTS = 0, 1
"""group_list_type: where each group ends, or how many rows it has. A single group must be told by its end."""


def moe_kernel(spec: MoESpec, platform: Platform, generation: Generation, graphs: NpuGraphs) -> FusedMoE:
    """The kernel that moe_choice.py says."""
    choice = choose_moe(spec, generation)
    if choice.op == "npu_grouped_matmul":
        return AscendMoE(spec, platform) if spec.scheme is None else TokenQuantMoE(spec, platform)
    if choice.op == "widened":
        assert spec.scheme is not None and can_widen(spec.scheme)
        return WidenedMoE(spec, platform, lambda plain: moe_kernel(plain, platform, generation, graphs))
    return PlainMoE(spec, platform, graphs, choice.why)


class PlainMoE(ReferenceMoE):
    """Core's reference on the device, expert by expert: it reads on the host which experts a step needs."""

    def __init__(self, spec: MoESpec, platform: Platform, graphs: NpuGraphs, why: str) -> None:
        super().__init__(spec, platform)
        self.name = "ascend reference"
        self._why = f"experts on the reference: {why}"
        self._graphs = graphs

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        self._graphs.reads_host(self._why)
        return super().experts(x, routing, packed, expert_map=expert_map)


@dataclass(slots=True)
class StackedExperts:
    """Matrices as the grouped product multiplies them: [num_experts, in, out], of which gate and up are one."""

    gate_up: Tensor  # [num_experts, hidden_size, 2 * intermediate_size]
    down: Tensor  # [num_experts, intermediate_size, hidden_size]
    gate_up_bias: Tensor | None  # [num_experts, 2 * intermediate_size]
    down_bias: Tensor | None


def grouped_product(x: Tensor, weights: Tensor, counts: Tensor, **options: Any) -> Tensor:
    """x [rows, in] times weights [num_experts, in, out], each expert its own rows."""
    result: Tensor = npu.npu_grouped_matmul(
        [x],
        [weights],
        group_list=counts,  # of one expert, how many rows it has is where it ends
        split_item=_ONE_TENSOR,
        group_type=_ROWS_IN_GROUPS,
        group_list_type=_ENDS if len(weights) == 1 else _COUNTS,
        **options,
    )[0]
    return result


class AscendMoE(ReferenceMoE):
    name = "ascend npu_grouped_matmul"

    def begin(self) -> StackedExperts:  # type: ignore[override]
        s = self.spec
        wide = 2 * s.intermediate_size
        return StackedExperts(
            gate_up=self._empty((s.num_held, s.hidden_size, wide)),
            down=self._empty((s.num_held, s.intermediate_size, s.hidden_size)),
            gate_up_bias=self._empty_bias(wide),
            down_bias=self._empty_bias(s.hidden_size),
        )

    def _empty_bias(self, width: int) -> Tensor | None:
        s = self.spec
        dtype = "float16" if s.dtype == "float16" else "float32"  # the op adds no bias of bfloat16
        return self.platform.empty((s.num_held, width), dtype, "weights") if s.bias else None

    def load(self, packed: StackedExperts, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:  # type: ignore[override]
        name, _, kind = part.partition(".")
        s = self.spec
        offset = s.intermediate_size if name == "up" else 0
        if kind == "bias":
            bias = packed.down_bias if name == "down" else packed.gate_up_bias
            assert bias is not None, f"{part}: the spec has no bias"
            bias[expert, offset : offset + len(tensor)].copy_(tensor)
            return
        matrix = (packed.down if name == "down" else packed.gate_up)[expert]
        first = offset + row
        matrix[:, first : first + len(tensor)].copy_(tensor.T)

    def expert_tensors(self, packed: StackedExperts, expert: int) -> list[Tensor]:  # type: ignore[override]
        held = (getattr(packed, field.name) for field in fields(packed))
        return [each[expert] for each in held if each is not None]

    def remap(self, packed: StackedExperts, expert_map: Tensor) -> StackedExperts:  # type: ignore[override]
        held = (expert_map >= 0).nonzero().squeeze(-1)
        local = held[expert_map[held].argsort()]
        biases = (packed.gate_up_bias, packed.down_bias)
        return StackedExperts(
            packed.gate_up[local], packed.down[local], *(None if bias is None else bias[local] for bias in biases)
        )

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        s = self.spec
        gating = choose_gating(s) if len(router_logits) else "reference"
        if gating == "reference":
            return super().route(router_logits, bias)
        logits = router_logits.float().contiguous()
        if gating == "softmax" and bias is None:
            weights, ids, _ = npu.npu_moe_gating_top_k_softmax(logits, None, s.top_k)
        else:
            sigmoid = s.scoring == "sigmoid"
            weights, ids, _ = npu.npu_moe_gating_top_k(
                logits, s.top_k, bias=None if bias is None else bias.float(), k_group=min(s.top_groups, s.num_groups),
                group_count=s.num_groups, group_select_mode=_BEST if bias is None else _TWO_BEST,
                norm_type=_SIGMOID if sigmoid else _SOFTMAX,
            )  # fmt: skip
            if sigmoid:  # divided by their sum within the op
                return Routing(weights * s.router_scale, ids)
        if s.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(weights * s.router_scale, ids)

    def experts(  # type: ignore[override]
        self, x: Tensor, routing: Routing, packed: StackedExperts, *, expert_map: Tensor | None = None
    ) -> Tensor:
        if not len(x):
            return x.new_empty(x.shape)
        held, weights = len(packed.gate_up), routing.weights
        ids, num_experts = routing.expert_ids, held
        if expert_map is not None:
            # Experts of other ranks become one more, the last: it is sorted behind all, and no group has its rows.
            local = expert_map[ids.long()]
            ids, num_experts = torch.where(local < 0, held, local), held + 1
            weights = weights.masked_fill(local < 0, 0)
        sorted_x, places, counts, _ = npu.npu_moe_init_routing_v2(
            x.contiguous(),
            ids.to(torch.int32),
            active_num=ids.numel(),
            expert_num=num_experts,
            drop_pad_mode=0,
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            quant_mode=-1,
            active_expert_range=[0, num_experts],
            row_idx_type=0,
        )
        counts = counts[:held]
        hidden = self._activated(self._product(sorted_x, packed, "gate_up", counts))
        parts = self._product(hidden, packed, "down", counts)
        if expert_map is not None:
            # Rows that no group has are not written, and may hold anything: a weight of zero does not take NaN away.
            absent = torch.arange(len(parts), device=parts.device) >= counts.sum()
            parts = parts.masked_fill(absent.unsqueeze(-1), 0)
        result: Tensor = npu.npu_moe_token_unpermute(parts, places, weights.to(parts.dtype))
        return result

    def _product(self, x: Tensor, packed: StackedExperts, name: str, counts: Tensor) -> Tensor:
        """[rows, out] by the experts' matrices of a name; `counts` [num_experts] int64 are rows by expert, in order."""
        bias = getattr(packed, f"{name}_bias")
        return grouped_product(x, getattr(packed, name), counts, bias=None if bias is None else [bias])

    def _activated(self, gate_up: Tensor) -> Tensor:
        if self.spec.activation != "silu":
            return functional.gated_activation(gate_up=gate_up, activation=self.spec.activation)
        result: Tensor = npu.npu_swiglu(gate_up, -1)
        return result


@dataclass(slots=True)
class QuantizedExperts(StackedExperts):
    """Weights int8, and a scale for each of their columns."""

    gate_up_scale: Tensor  # [num_experts, 2 * intermediate_size]
    down_scale: Tensor  # [num_experts, hidden_size]


class TokenQuantMoE(AscendMoE):
    """int8 weights and activations: a row is rounded by a scale of its own before each product."""

    name = "ascend npu_grouped_matmul (int8)"

    def begin(self) -> QuantizedExperts:  # type: ignore[override]
        s = self.spec
        shapes = {"gate_up": (s.hidden_size, 2 * s.intermediate_size), "down": (s.intermediate_size, s.hidden_size)}
        # Of a result in bfloat16 the op takes scales in bfloat16, of one in float16 in float32.
        dtype = "bfloat16" if s.dtype == "bfloat16" else "float32"

        def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
            return self.platform.empty((s.num_held, *shape), dtype, "weights")

        arrays = {name: empty(shape, "int8") for name, shape in shapes.items()}
        arrays |= {f"{name}_scale": empty(shape[1:], dtype) for name, shape in shapes.items()}
        return QuantizedExperts(**arrays, gate_up_bias=None, down_bias=None)

    def load(self, packed: QuantizedExperts, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:  # type: ignore[override]
        name, _, kind = part.partition(".")
        if kind != "scale":
            super().load(packed, expert, part, tensor, row=row)
            return
        s = self.spec
        scales = (packed.down_scale if name == "down" else packed.gate_up_scale)[expert]
        rows = s.hidden_size if name == "down" else s.intermediate_size
        first = s.intermediate_size if name == "up" else 0
        scales[first : first + rows].copy_(tensor.view(-1).expand(rows))  # one for all rows, or one for each

    def remap(self, packed: QuantizedExperts, expert_map: Tensor) -> QuantizedExperts:  # type: ignore[override]
        held = (expert_map >= 0).nonzero().squeeze(-1)
        local = held[expert_map[held].argsort()]
        names = ("gate_up", "down", "gate_up_scale", "down_scale")
        return QuantizedExperts(
            **{name: getattr(packed, name)[local] for name in names}, gate_up_bias=None, down_bias=None
        )

    def _product(self, x: Tensor, packed: StackedExperts, name: str, counts: Tensor) -> Tensor:
        values, scales = npu.npu_dynamic_quant(x)
        return grouped_product(
            values,
            getattr(packed, name),
            counts,
            scale=[getattr(packed, f"{name}_scale")],
            per_token_scale=[scales],
            output_dtype=TYPE_NUMBERS[x.dtype],
        )
