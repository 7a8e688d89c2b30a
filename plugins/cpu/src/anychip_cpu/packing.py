"""Weights in panels of 32 outputs, as kernels/weights.h describes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from anychip.plugin_api import INT4_ZERO, QuantScheme
from anychip_cpu.memory import zeroed
from anychip_cpu.native import DTYPES, Kernels, fields

PANEL = 32
_STEP = {"float32": 2, "bfloat16": 2, "int8": 8, "float8_e4m3fn": 2, "int4": 8}
"""Inputs that lie together."""
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "float8_e4m3fn": 8, "int4": 4}
_STORED = {
    **dict.fromkeys(("int8", "int8-float-zeros", "int8-w8a8"), "int8"),
    **dict.fromkeys(("int4", "int4-float-zeros"), "int4"),
    **dict.fromkeys(("fp8", "fp8-w8a16"), "float8_e4m3fn"),
}
"""By a scheme's name: the form of its values. No other scheme lies in panels."""


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def why_not(scheme: QuantScheme | None, columns: int) -> str:
    """Why panels do not hold a scheme's matrix of so many columns; "" where they do."""
    if scheme is not None and scheme.name not in _STORED:
        return f"{scheme.name}: panels hold {', '.join(_STORED)}"
    if scheme is None or scheme.group_size is None or scheme.group_size >= columns or scheme.group_size % 8 == 0:
        return ""
    return f"groups of {scheme.group_size} columns, not a multiple of 8"


@dataclass(slots=True)
class Panels:
    """`count` matrices of one shape: 1, or a layer's experts. `span` outputs of a matrix share a panel, from `lane` on:
    32 and 0, but where gate and up share theirs."""

    kernels: Kernels
    count: int
    outputs: int  # with padding, a multiple of PANEL
    columns: int
    dtype: str
    scheme: QuantScheme | None
    values: Tensor  # uint8 [count, bytes]
    scales: Tensor | None  # [count, groups, outputs] float32
    zero_points: Tensor | None  # likewise, as loaded
    zeros: Tensor | None  # zero * scale
    sums: Tensor | None  # [outputs] int32
    input_scale: Tensor | None  # [count] float32
    rows: int
    """Outputs without padding."""
    _described: list[bytes] = field(default_factory=list)

    @classmethod
    def allocate(
        cls, kernels: Kernels, rows: int, columns: int, dtype: str, scheme: QuantScheme | None, *, count: int = 1
    ) -> Panels:
        outputs = round_up(rows, PANEL)
        stored = dtype if scheme is None else _STORED[scheme.name]
        # Bytes times bytes: one scale for a row of activations, and one for an output.
        exact = (
            scheme is not None and scheme.activation_format == "int8" and scheme.activations == "token" and count == 1
            and scheme.group_size is None
        )  # fmt: skip
        nbytes = round_up(columns, _STEP[stored]) * outputs * _BITS[stored] // 8
        groups = 1 if scheme is None or not scheme.group_size else -(-columns // scheme.group_size)
        grouped = (count, groups, outputs)
        return cls(
            kernels=kernels,
            count=count,
            outputs=outputs,
            columns=columns,
            dtype=stored,
            scheme=scheme,
            values=zeroed(count * nbytes).view(count, nbytes),
            scales=None if scheme is None else torch.zeros(grouped),
            zero_points=torch.zeros(grouped) if scheme is not None and scheme.zero_points else None,
            zeros=torch.zeros(grouped) if scheme is not None and scheme.zero_points else None,
            sums=torch.zeros(outputs, dtype=torch.int32) if exact else None,
            input_scale=torch.zeros(count) if scheme is not None and scheme.activations == "static" else None,
            rows=rows,
        )

    def described(self, index: int = 0) -> bytes:
        """kernels/weights.h's PackedWeights of a matrix: its storage never moves."""
        if not self._described:
            self._described = [self._describe(i) for i in range(self.count)]
        return self._described[index]

    def _describe(self, index: int) -> bytes:
        groups = 1 if self.scales is None else self.scales.shape[1]
        scheme = self.scheme
        rounding, rounding_group = 0, self.columns
        if scheme is not None and scheme.activations != "plain" and self.sums is None:
            rounding = DTYPES["int8" if scheme.activation_format == "int8" else "float8_e4m3fn"]
            if scheme.activations == "group" and scheme.group_size:
                rounding_group = scheme.group_size
        return fields(
            DTYPES[self.dtype],
            self.rows,
            self.columns,
            self.values[index].data_ptr(),
            self.values.shape[1] * PANEL // self.outputs,
            _address(self.scales, index),
            _address(self.zeros, index),
            groups,
            self.columns if groups == 1 or scheme is None or not scheme.group_size else scheme.group_size,
            0 if self.sums is None else self.sums.data_ptr(),
            rounding,
            rounding_group,
            _address(self.input_scale, index),
        )

    def of_matrix(self, index: int) -> list[Tensor]:
        """All that is kept of one matrix, as views."""
        assert self.sums is None, "sums are of a single matrix"
        parts = (self.values, self.scales, self.zero_points, self.zeros, self.input_scale)
        return [part[index : index + 1] for part in parts if part is not None]

    def put(
        self, kind: str, tensor: Tensor, place: slice, *, index: int = 0, row: int = 0, lane: int = 0, span: int = PANEL
    ) -> None:
        """One kind of a part: its values from row `row` on, or its scales or zeros whole. `place` are the part's rows
        in the matrix; kinds and forms are QuantScheme's."""
        if kind == "":
            held = (tensor.to(getattr(torch, self.dtype)) if self.scheme is None else tensor).contiguous()
            self.kernels.pack_rows(self.described(index), held.data_ptr(), len(held), place.start + row, span, lane)
        elif kind == "input_scale":
            assert self.input_scale is not None
            # Parts of one product see the same activations: the widest range holds them all.
            self.input_scale[index] = max(float(self.input_scale[index]), float(tensor))
        else:
            assert self.scales is not None and self.scheme is not None
            values = self._by_output(tensor.float(), place.stop - place.start)  # [groups, rows]
            outputs = torch.arange(place.start, place.stop)
            at = outputs // span * PANEL + lane + outputs % span
            if kind == "scale":
                self.scales[index][:, at] = values
            else:
                assert kind == "zero" and self.zero_points is not None, kind
                self.zero_points[index][:, at] = values - (INT4_ZERO if self.scheme.values == "int4" else 0)
            if self.zeros is not None and self.zero_points is not None:
                torch.mul(self.zero_points[index], self.scales[index], out=self.zeros[index])

    def _by_output(self, tensor: Tensor, rows: int) -> Tensor:
        assert self.scales is not None and self.scheme is not None
        if self.scheme.scales == "block":
            assert self.scheme.group_size is not None
            tensor = tensor.repeat_interleave(self.scheme.group_size, dim=0)[:rows]
        return tensor.view(-1, self.scales.shape[1]).expand(rows, -1).T


def _address(tensor: Tensor | None, index: int) -> int:
    return 0 if tensor is None else tensor[index].data_ptr()
