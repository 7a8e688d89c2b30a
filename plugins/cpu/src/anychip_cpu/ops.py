"""Overrides of ops by compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import DRAWN, ActFormat, AdapterStack, op_override
from anychip_cpu.native import DTYPES, Kernels, fields

CODES = {torch.float32: DTYPES["float32"], torch.bfloat16: DTYPES["bfloat16"]}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swiglu_clamped": 2}


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x [..., width] as rows and how far they lie apart, copied only where its strides are not those of rows."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    x = x.contiguous()
    return x, x.shape[-1]


@op_override("count_tokens", version=1)
def count_tokens(*, counts: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
    """In place, with or without compiled kernels: a new table would be as large as all slots' vocabularies."""
    return counts.index_put_((slots.long(), ids.long()), counts.new_full((), DRAWN), accumulate=True)


class CpuOps:
    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def overrides(self) -> Mapping[str, Callable[..., Any]]:
        names = (
            "embedding", "rms_norm", "gated_activation", "apply_token_masks", "edit_logits", "sample",
            "residual_norm_quant", "gate_up_act_quant", "add_low_rank",
        )  # fmt: skip
        return {"count_tokens": count_tokens} | {name: getattr(self, name) for name in names}

    @op_override("embedding", version=1)
    def embedding(self, *, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
        # A copy must be held while its address is in use.
        ids, weight = ids.to(torch.int32).contiguous(), weight.contiguous()
        out = weight.new_empty((len(ids), weight.shape[1]))
        row_bytes = weight.shape[1] * weight.element_size()
        self._kernels.embedding(
            ids.data_ptr(), weight.data_ptr(), out.data_ptr(), len(ids), len(weight), row_bytes, first
        )
        return out

    @op_override("rms_norm", version=1)
    def rms_norm(self, *, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
        return self.residual_norm_quant(x=x, residual=None, weight=weight, eps=eps, unit_offset=unit_offset)[0]

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
        held, ldx = rows_of(x)
        weight = weight.contiguous()
        shape, dtype = x.shape, x.dtype
        out = torch.empty(shape, dtype=dtype)
        total, added, ldr = x, 0, 0
        if residual is not None:
            residual, ldr = rows_of(residual)
            total, added = torch.empty(shape, dtype=dtype), residual.data_ptr()
        self._kernels.rms_norm(
            CODES[dtype], held.data_ptr(), added, weight.data_ptr(), out.data_ptr(), total.data_ptr(),
            math.prod(shape[:-1]), shape[-1], ldx, ldr, eps, unit_offset,
        )  # fmt: skip
        return out, total

    @op_override("gated_activation", version=1)
    def gated_activation(self, *, gate_up: Tensor, activation: str) -> Tensor:
        return self.gate_up_act_quant(gate_up=gate_up, activation=activation)

    @op_override("gate_up_act_quant", version=1)
    def gate_up_act_quant(self, *, gate_up: Tensor, activation: str, out_format: ActFormat | None = None) -> Tensor:
        held, ldx = rows_of(gate_up)
        width = gate_up.shape[-1] // 2
        rows = gate_up.shape[:-1]
        out = torch.empty((*rows, width), dtype=gate_up.dtype)
        self._kernels.gated_activation(
            CODES[gate_up.dtype], held.data_ptr(), out.data_ptr(), math.prod(rows), width, ldx,
            ACTIVATIONS[activation],
        )  # fmt: skip
        return out

    @op_override("apply_token_masks", version=1)
    def apply_token_masks(self, *, logits: Tensor, masks: Tensor) -> Tensor:
        held, ld = rows_of(logits.float())
        masks = masks.to(torch.int32).contiguous()
        out = torch.empty(logits.shape, dtype=torch.float32)
        self._kernels.apply_token_masks(
            held.data_ptr(), masks.data_ptr(), out.data_ptr(), *logits.shape, ld, masks.shape[1]
        )
        return out

    @op_override("edit_logits", version=2)
    def edit_logits(
        self,
        *,
        logits: Tensor,
        slots: Tensor,
        counts: Tensor,
        repetition_penalty: Tensor,
        presence_penalty: Tensor,
        frequency_penalty: Tensor,
        bias_ids: Tensor,
        biases: Tensor,
        num_biases: Tensor,
    ) -> Tensor:
        held, ld = rows_of(logits.float())
        out = torch.empty(logits.shape, dtype=torch.float32)
        slots, num_biases = (t.to(torch.int32).contiguous() for t in (slots, num_biases))
        by_row = [t.float().contiguous() for t in (repetition_penalty, presence_penalty, frequency_penalty)]
        counts, bias_ids, biases = counts.contiguous(), bias_ids.contiguous(), biases.contiguous()
        self._kernels.edit_logits(
            held.data_ptr(), out.data_ptr(), *logits.shape, ld, slots.data_ptr(), counts.data_ptr(),
            *(t.data_ptr() for t in by_row), bias_ids.data_ptr(), biases.data_ptr(), num_biases.data_ptr(),
            bias_ids.shape[1],
        )  # fmt: skip
        return out

    @op_override("sample", version=1)
    def sample(
        self,
        *,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed_low: Tensor,
        seed_high: Tensor,
        sample_index: Tensor,
        position: Tensor,
        all_greedy: bool = False,
    ) -> Tensor:
        held, ld = rows_of(logits.float())
        ids = torch.empty(len(logits), dtype=torch.int32)
        floats = [t.float().contiguous() for t in (temperature, top_p, min_p)]
        ints = [t.to(torch.int32).contiguous() for t in (top_k, seed_low, seed_high, sample_index, position)]
        temperature, top_p, min_p = floats
        self._kernels.sample(
            held.data_ptr(), len(logits), logits.shape[-1], ld, 0 if all_greedy else temperature.data_ptr(),
            ints[0].data_ptr(), top_p.data_ptr(), min_p.data_ptr(), *(t.data_ptr() for t in ints[1:]), ids.data_ptr(),
        )  # fmt: skip
        return ids

    @op_override("add_low_rank", version=1)
    def add_low_rank(self, *, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
        """In place; rows of y must be whole, as every product's are."""
        held, ldx = rows_of(x)
        if y.stride(-1) != 1:
            y = y.contiguous()
        num_slots, num_parts, max_rank, width = stack.down.shape
        offsets = torch.tensor(stack.offsets, dtype=torch.int64)
        slots = slots.to(torch.int32).contiguous()
        described = fields(
            stack.down.data_ptr(), stack.up.data_ptr(), stack.scales.data_ptr(), stack.ranks.data_ptr(),
            num_slots, num_parts, max_rank, width, y.shape[-1], offsets.data_ptr(),
        )  # fmt: skip
        self._kernels.add_low_rank(
            CODES[y.dtype], held.data_ptr(), ldx, y.data_ptr(), y.stride(0), described, slots.data_ptr(), len(slots)
        )
        return y
