"""Overrides of single and composite ops with Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import ActFormat, op_override
from anychip_triton.formats import is_plain, new_rows
from anychip_triton.kernels import embedding, norm, sampling, truncation
from anychip_triton.launch import Launcher, split_tile
from anychip_triton.shapes import power_of_two, rows_of

_FEW = 256
"""Biases, or rows, that one program takes."""


class TritonOps:
    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    def overrides(self) -> Mapping[str, Callable[..., Any]]:
        """By op name."""
        served = (
            self.embedding, self.rms_norm, self.residual_norm_quant, self.gated_activation, self.gate_up_act_quant,
            self.apply_token_masks, self.edit_logits, self.count_tokens, self.sample,
        )  # fmt: skip
        return {method.__name__: method for method in served}

    @op_override("embedding", version=1)
    def embedding(self, *, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
        rows, width = weight.shape
        out = torch.empty((ids.numel(), width), dtype=weight.dtype, device=weight.device)
        blocks, options = split_tile(self._launch.tiles.tile("embedding", width=width))
        self._launch(
            embedding.embedding, (ids.numel(), -(-width // blocks["BLOCK"])), options,
            out=out, ids=ids, weight=weight, first=first, rows=rows, width=width, stride=weight.stride(0), **blocks,
        )  # fmt: skip
        return out

    @op_override("rms_norm", version=1)
    def rms_norm(self, *, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
        return self._norm(x, None, weight, eps, unit_offset)[0]

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
        return self._norm(x, residual, weight, eps, unit_offset, out_format)

    def _norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        unit_offset: bool,
        out_format: ActFormat | None = None,
    ) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        rows = rows_of(x)
        carried = rows if residual is None else rows_of(residual)
        result, told = _new_result(x.shape, x, out_format)
        total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tile = self._launch.tiles.tile("rms_norm", width=width)
        self._launch(
            norm.rms_norm, (rows.shape[0],), split_tile(tile)[1],
            total=total, x=rows, residual=carried, weight=weight, eps=eps, x_stride=rows.stride(0),
            residual_stride=carried.stride(0), width=width, BLOCK=power_of_two(width),
            HAS_RESIDUAL=residual is not None, UNIT_OFFSET=unit_offset, **told,
        )  # fmt: skip
        return result, total

    @op_override("gated_activation", version=1)
    def gated_activation(self, *, gate_up: Tensor, activation: str) -> Tensor:
        return self.gate_up_act_quant(gate_up=gate_up, activation=activation)

    @op_override("gate_up_act_quant", version=1)
    def gate_up_act_quant(self, *, gate_up: Tensor, activation: str, out_format: ActFormat | None = None) -> Tensor:
        width = gate_up.shape[-1] // 2
        rows = rows_of(gate_up)
        result, told = _new_result((*gate_up.shape[:-1], width), gate_up, out_format)
        blocks, options = split_tile(self._launch.tiles.tile("gated_activation", width=width))
        if told["KIND"] and not told["GROUP"]:  # a row's scale needs all of it
            blocks, options = split_tile(self._launch.tiles.tile("rms_norm", width=width))
            blocks["BLOCK"] = power_of_two(width)
        blocks["BLOCK"] = max(blocks["BLOCK"], told["GROUP"])
        self._launch(
            norm.gated_activation, (rows.shape[0], -(-width // blocks["BLOCK"])), options,
            gate_up=rows, stride=rows.stride(0), width=width, ACTIVATION=activation, **told, **blocks,
        )  # fmt: skip
        return result

    @op_override("apply_token_masks", version=1)
    def apply_token_masks(self, *, logits: Tensor, masks: Tensor) -> Tensor:
        logits = rows_of(logits)
        rows, vocab = logits.shape
        out = torch.empty((rows, vocab), dtype=logits.dtype, device=logits.device)
        blocks, options = split_tile(self._launch.tiles.tile("mask_tokens", width=vocab))
        self._launch(
            sampling.mask_tokens, (rows, -(-vocab // blocks["BLOCK"])), options,
            out=out, logits=logits, masks=masks, vocab=vocab, stride=logits.stride(0), words=masks.stride(0), **blocks,
        )  # fmt: skip
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
        logits = rows_of(logits)
        rows, vocab = logits.shape
        width = bias_ids.shape[-1]
        out = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)
        blocks, options = split_tile(self._launch.tiles.tile("edit_logits", width=vocab))
        self._launch(
            sampling.edit_logits, (rows, -(-vocab // blocks["BLOCK"])), options,
            out=out, logits=logits, slots=slots, counts=counts, repetition=repetition_penalty,
            presence=presence_penalty, frequency=frequency_penalty, vocab=vocab, stride=logits.stride(0), **blocks,
        )  # fmt: skip
        self._launch(
            sampling.add_biases, (rows, -(-width // _FEW)), options,
            out=out, slots=slots, bias_ids=bias_ids, biases=biases, num_biases=num_biases, vocab=vocab, width=width,
            BLOCK=_FEW,
        )  # fmt: skip
        return out

    @op_override("count_tokens", version=1)
    def count_tokens(self, *, counts: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
        options = split_tile(self._launch.tiles.tile("edit_logits", width=counts.shape[-1]))[1]
        self._launch(
            sampling.count_tokens, (-(-len(ids) // _FEW),), options,
            counts=counts, slots=slots, ids=ids, rows=len(ids), vocab=counts.shape[-1], BLOCK=_FEW,
        )  # fmt: skip
        return counts

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
        logits = rows_of(logits)
        rows, vocab = logits.shape
        blocks, options = split_tile(self._launch.tiles.tile("sample", width=vocab))
        ways, block = blocks["WAYS"], blocks["BLOCK"]
        parts = -(-vocab // block)

        def new(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((rows, *shape), dtype=dtype, device=logits.device)

        row: dict[str, Any] = {
            "logits": logits, "bests": new(torch.int64, parts), "vocab": vocab, "stride": logits.stride(0),
            "parts": parts, "BLOCK": block,
        }  # fmt: skip
        self._launch(sampling.best_of_parts, (rows, parts), options, **row)
        row["PARTS"] = power_of_two(parts)
        out, last, threshold = new(torch.int32), new(torch.int32), new(torch.int64)
        weights = new(torch.float64, parts)
        if not all_greedy:
            self._launch(sampling.weigh_parts, (rows, parts), options, weights=weights, temperature=temperature, **row)
            self._launch(
                truncation.truncate, (rows,), options,
                threshold_out=threshold, last_out=last, weights=weights, temperature=temperature, top_k=top_k,
                top_p=top_p, min_p=min_p, WAYS=ways, **row,
            )  # fmt: skip
        self._launch(
            sampling.draw, (rows,), options,
            out=out, weights=weights, threshold=threshold, last=last, temperature=temperature, min_p=min_p,
            seed_low=seed_low, seed_high=seed_high, sample_index=sample_index, position=position,
            ALL_GREEDY=all_greedy, **row,
        )  # fmt: skip
        return out


def _new_result(shape: Sequence[int], like: Tensor, out_format: ActFormat | None) -> tuple[Tensor, dict[str, Any]]:
    """A tensor for a result of a shape in a format, and what kernels are told of it."""
    if out_format is not None and not is_plain(out_format):
        return new_rows(shape, out_format, like.device)
    result = torch.empty(shape, dtype=like.dtype, device=like.device)
    return result, {"out": result, "scales": result, "out_stride": shape[-1], "scale_stride": 0, "KIND": "", "GROUP": 0}
