"""State layers in one compiled call each, which may be recorded: matrices by head, causal convolutions, selective
scans. Other recurrences are the reference's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import DenseStates
from anychip.plugin_api import Recorder, ShapeKey, StateLayer, StateSpec, StateView
from anychip_cpu.native import DTYPES, Kernels, fields
from anychip_cpu.ops import rows_of

States = dict[str, Tensor]

_MOST_CONVOLVED = 4
"""kernels/state_types.h's kMostConvolved."""
_MATRICES = {"gated_delta": 0, "kda": 1, "lightning": 2, "ssd": 3}
"""kernels/state_types.h's Recurrence."""


def has_kernel(spec: StateSpec) -> bool:
    if spec.recurrence == "causal_conv":
        return spec.arrays[0].shape[0] < _MOST_CONVOLVED
    return spec.recurrence in _MATRICES or spec.recurrence == "selective_scan"


@dataclass(slots=True)
class StatePlan:
    """kernels/state_types.h's StateStep over a step's arrays: query_start, seq_lens, state_blocks."""

    step: bytes
    arrays: tuple[Tensor, ...]
    num_tokens: int
    """Of rows: behind them is padding, whose output is zeros."""


class CpuStates(DenseStates):
    """`name` is that of the kernels' variant. The state of SSD lies as [heads, state_dim, head_dim]: what a token reads
    by then are rows, as in the other recurrences."""

    def __init__(self, spec: StateSpec, kernels: Kernels, name: str) -> None:
        super().__init__(spec)
        self.name = f"cpu-{name}"
        self._kernels = kernels
        self._turned = spec.recurrence == "ssd"
        forms: Mapping[str, Callable[..., Tensor]] = {"causal_conv": self._convolved, "selective_scan": self._scanned}
        self._advanced = forms.get(spec.recurrence, self._by_matrix)

    # -- the cache ----------------------------------------------------------------------------------------

    def make_cache(self, raw: Tensor, num_blocks: int) -> States:
        cache = super().make_cache(raw, num_blocks)
        if self._turned:
            blocks, heads, head_dim, state_dim = cache["state"].shape
            cache["state"] = cache["state"].view(blocks, heads, state_dim, head_dim)
        return cache

    def export_arrays(self, cache: States, ids: Sequence[int]) -> dict[str, Tensor]:
        arrays = super().export_arrays(cache, ids)
        return {"state": arrays["state"].transpose(2, 3).contiguous()} if self._turned else arrays

    def import_arrays(self, cache: States, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> States:
        if self._turned:
            arrays = {"state": arrays["state"].transpose(2, 3)}
        return super().import_arrays(cache, ids, arrays)

    # -- a step -------------------------------------------------------------------------------------------

    def plan(
        self,
        view: StateView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> StatePlan:
        arrays = view.query_start, view.seq_lens, view.state_blocks
        if isinstance(into, StatePlan):
            for held, given in zip(into.arrays, arrays, strict=True):
                if held is not given:
                    held.copy_(given)
            into.num_tokens = int(view.query_start[-1])
            return into
        starts, lengths, blocks = arrays = tuple(given.to(torch.int32).contiguous() for given in arrays)
        step = fields(starts.data_ptr(), lengths.data_ptr(), blocks.data_ptr(), len(lengths), view.num_tokens)
        return StatePlan(step, arrays, int(starts[-1]))

    def forward(
        self, inputs: Mapping[str, Tensor], cache: States, plan: StatePlan, layer: StateLayer
    ) -> tuple[Tensor, States]:
        return self._advanced(inputs, cache, plan, layer.weights), cache

    def _by_matrix(self, inputs: Mapping[str, Tensor], cache: States, plan: StatePlan, weights: Any) -> Tensor:
        kind, kernels = self.spec.recurrence, self._kernels
        q, k, v = (_heads(inputs[name]) for name in (("c", "b", "x") if kind == "ssd" else ("q", "k", "v")))
        g, beta = inputs.get("dt" if kind == "ssd" else "g"), inputs.get("beta")
        heads, (groups, key_dim) = v.shape[1], q.shape[1:]
        by_head, skip = (
            None if held is None else held.contiguous()
            for held in (weights.get("a", weights.get("slope")), weights.get("d"))
        )  # fmt: skip
        rule = fields(
            _MATRICES[kind], DTYPES[self.spec.dtype], heads, groups, key_dim, v.shape[2], _address(by_head),
            _address(skip),
        )  # fmt: skip
        given = [q, k, v, *(held if held is None or held.dim() == 2 else _heads(held) for held in (g, beta))]
        described = fields(*(part for held in given for part in _described(held)))
        out = torch.empty(v.shape, dtype=v.dtype)
        kernels.matrix_state(rule, plan.step, described, cache["state"].data_ptr(), out.data_ptr())
        return out

    def _convolved(self, inputs: Mapping[str, Tensor], cache: States, plan: StatePlan, weights: Any) -> Tensor:
        (x, ldx), weight = rows_of(inputs["x"]), weights["weight"].contiguous()
        bias = weights["bias"].contiguous() if "bias" in weights else None
        out = torch.empty(x.shape, dtype=x.dtype)
        self._kernels.convolution(
            plan.step, DTYPES[self.spec.dtype], *weight.shape, weight.data_ptr(), _address(bias),
            x.data_ptr(), ldx, cache["tail"].data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def _scanned(self, inputs: Mapping[str, Tensor], cache: States, plan: StatePlan, weights: Any) -> Tensor:
        given = [rows_of(inputs[name]) for name in ("x", "dt", "b", "c")]
        x, a, d = given[0][0], weights["a"].contiguous(), weights["d"].contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        self._kernels.scan(
            plan.step, DTYPES[self.spec.dtype], *a.shape, a.data_ptr(), d.data_ptr(),
            *(part for rows, apart in given for part in (rows.data_ptr(), apart)), cache["state"].data_ptr(),
            out.data_ptr(),
        )  # fmt: skip
        return out


def _heads(x: Tensor) -> Tensor:
    """[num_tokens, heads, values], copied only where values do not lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _described(x: Tensor | None) -> tuple[int, int, int]:
    """kernels/state_types.h's StateInput of [num_tokens, heads, values] or [num_tokens, heads]."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
