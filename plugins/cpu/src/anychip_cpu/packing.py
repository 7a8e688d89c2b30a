"""Weights in panels of 32 outputs, as kernels/weights.h describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anychip.plugin_api import INT4_ZERO, QuantScheme
from anychip_cpu.memory import zeroed
from anychip_cpu.native import DTYPES, Kernels, fields

PANEL = 32
_STEP = {"float32": 2, "bfloat16": 2, "float8_e4m3fn": 2}
"""Inputs that lie together; of others, a block of codes."""
_BLOCK = 32
_BITS = {
    "float32": 32, "bfloat16": 16, "int8": 8, "float8_e4m3fn": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2,
    "table": 4,
}  # fmt: skip
_FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_STORED = {"fp8_e4m3": "float8_e4m3fn", "codebook": "table", "fp4_e2m1": "table"}
"""By a scheme's values, the form in which panels hold them, where its name differs."""
_SCALES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "e8m0": torch.uint8}
_SCALE_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.int8: "int8", torch.uint8: "e8m0"}
_TRANSPOSED = {1: "float8_e4m3fn", 2: "float16", 4: "float32"}
"""By the bytes of a scale: a type whose panels lie as scales do, [groups][PANEL]."""


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def why_not(scheme: QuantScheme | None, columns: int) -> str:
    """Why panels do not hold a scheme's matrix of so many columns; "" where they do."""
    if scheme is None:
        return ""
    if why := _why_not_values(scheme):
        return f"{scheme.name}: {why}"
    if scheme.group_size is not None and scheme.group_size < columns and scheme.group_size % 8:
        return f"groups of {scheme.group_size} columns, not a multiple of 8"
    if scheme.super_group_size is not None and scheme.group_size is not None:
        ratio = scheme.super_group_size // scheme.group_size
        if ratio & (ratio - 1):
            return f"{ratio} groups with a scale above theirs, not a power of two"
    return ""


def _why_not_values(scheme: QuantScheme) -> str:
    if scheme.values == "fp8_e5m2" or (scheme.values == "fp8_e4m3" and scheme.scale_format != "float32"):
        return "panels hold fp8_e4m3 with float32 scales alone"
    if scheme.scale_format == "e4m3" or (scheme.scale_format == "e8m0") != (scheme.values == "fp4_e2m1"):
        return f"panels hold no {scheme.values} with {scheme.scale_format} scales"
    if scheme.super_group_size and scheme.zero_points not in (None, "minima"):
        return "panels hold no zero points with int8 scales"
    if scheme.codebook and _table(scheme) is None:
        return "panels hold codebooks of sixteen whole numbers of eight bits"
    # Activations in bytes meet bytes: int4's are rounded and expanded again.
    own = scheme.values if scheme.values in ("int8", "fp8_e4m3") else None
    if scheme.activation_format not in (None, own):
        return "panels hold no such weights with rounded activations"
    return ""


def _table(scheme: QuantScheme) -> Sequence[int] | None:
    """Of weights that are looked up: the numbers of the sixteen codes, of e2m1 doubled."""
    if scheme.values == "fp4_e2m1":
        return _FP4_DOUBLED
    whole = len(scheme.codebook) == 16 and all(x == int(x) and -128 <= x < 128 for x in scheme.codebook)
    return [int(x) for x in scheme.codebook] if whole else None


@dataclass(slots=True)
class Grouped:
    """Scales, or another number of every group: [count, panels, groups, PANEL]."""

    kernels: Kernels
    held: Tensor

    @classmethod
    def allocate(cls, kernels: Kernels, count: int, outputs: int, groups: int, dtype: torch.dtype) -> Grouped:
        shape = (count, outputs // PANEL, groups, PANEL)
        return cls(kernels, zeroed(count * outputs * groups * dtype.itemsize).view(dtype).view(shape))

    def put(self, rows: Tensor, index: int, first: int, span: int, lane: int) -> None:
        """[rows, groups] of the outputs from `first` on."""
        rows = rows.to(self.held.dtype).contiguous()
        _, panels, groups, _ = self.held.shape
        size = self.held.element_size()
        kind, nbytes = DTYPES[_TRANSPOSED[size]], groups * PANEL * size
        target = described(kind, panels * PANEL, groups, self.address(index), nbytes)
        self.kernels.pack_rows(target, rows.data_ptr(), len(rows), first, span, lane)

    def address(self, index: int) -> int:
        return int(self.held[index].data_ptr())

    @property
    def num_groups(self) -> int:
        return self.held.shape[2]


def described(kind: int, rows: int, columns: int, address: int, panel_bytes: int, **others: int) -> bytes:
    """kernels/weights.h's PackedWeights; `others` by the names of its fields."""
    given = {"groups": 1, "group_size": columns, "rounding_group": columns, **others}
    names = (
        "scales", "zeros", "super_scales", "super_zeros", "scale_type", "super_shift", "groups", "group_size", "lift",
        "table", "sums", "rounding", "rounding_group", "fixed_scale",
    )  # fmt: skip
    assert given.keys() <= set(names)
    return fields(kind, rows, columns, address, panel_bytes, *(given.get(name, 0) for name in names))


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
    grouped: dict[str, Grouped]
    """By kind, as loaded; "zeros" are what the product takes off, where zero points were loaded."""
    sums: Tensor | None  # [outputs] int32
    input_scale: Tensor | None  # [count] float32
    table: Tensor | None  # [16] int8
    rows: int
    """Outputs without padding."""
    _described: list[bytes] = field(default_factory=list)

    @classmethod
    def allocate(
        cls, kernels: Kernels, rows: int, columns: int, dtype: str, scheme: QuantScheme | None, *, count: int = 1
    ) -> Panels:
        outputs = round_up(rows, PANEL)
        stored = dtype if scheme is None else _STORED.get(scheme.values, scheme.values)
        # Bytes times bytes: one scale for a row of activations, and one for an output.
        exact = (
            scheme is not None and scheme.activation_format == "int8" and scheme.activations == "token" and count == 1
            and scheme.group_size is None
        )  # fmt: skip
        nbytes = round_up(columns, _STEP.get(stored, _BLOCK)) * outputs * _BITS[stored] // 8
        table = None if scheme is None or stored != "table" else _table(scheme)
        return cls(
            kernels=kernels,
            count=count,
            outputs=outputs,
            columns=columns,
            dtype=stored,
            scheme=scheme,
            values=zeroed(count * nbytes).view(count, nbytes),
            grouped={} if scheme is None else _allocate_grouped(kernels, count, outputs, columns, scheme),
            sums=torch.zeros(outputs, dtype=torch.int32) if exact else None,
            input_scale=torch.zeros(count) if scheme is not None and scheme.activations == "static" else None,
            table=None if table is None else torch.tensor(table, dtype=torch.int8),
            rows=rows,
        )

    def described(self, index: int = 0) -> bytes:
        """kernels/weights.h's PackedWeights of a matrix: its storage never moves."""
        if not self._described:
            self._described = [self._describe(i) for i in range(self.count)]
        return self._described[index]

    def _describe(self, index: int) -> bytes:
        nbytes = self.values.shape[1] * PANEL // self.outputs
        place = DTYPES[self.dtype], self.rows, self.columns, self.values[index].data_ptr(), nbytes
        if (scheme := self.scheme) is None:
            return described(*place)
        rounding, rounding_group = 0, self.columns
        if scheme.activations != "plain" and self.sums is None:
            rounding = DTYPES["int8" if scheme.activation_format == "int8" else "float8_e4m3fn"]
            if scheme.activations == "group" and scheme.group_size:
                rounding_group = scheme.group_size

        def address(*kinds: str) -> int:
            return next((self.grouped[kind].address(index) for kind in kinds if kind in self.grouped), 0)

        scale = self.grouped["scale"]
        groups, size = scale.num_groups, scheme.group_size
        ratio = scheme.super_group_size // size if scheme.super_group_size and size else 1
        return described(
            *place,
            scales=address("scale"),
            zeros=address("minimum", "zeros"),
            super_scales=address("super_scale"),
            super_zeros=address("super_minimum"),
            scale_type=DTYPES[_SCALE_TYPES[scale.held.dtype]],
            super_shift=ratio.bit_length() - 1,
            groups=groups,
            group_size=self.columns if groups == 1 or not size else size,
            # Codes of few bits are taken as signed, but where minima say what is taken off.
            lift=1 << (scheme.bits - 1) if scheme.zero_points == "minima" and scheme.values != "int8" else 0,
            table=0 if self.table is None else self.table.data_ptr(),
            sums=0 if self.sums is None else self.sums.data_ptr(),
            rounding=rounding,
            rounding_group=rounding_group,
            fixed_scale=0 if self.input_scale is None else self.input_scale[index].data_ptr(),
        )

    def of_matrix(self, index: int) -> list[Tensor]:
        """All that is kept of one matrix, as views."""
        assert self.sums is None, "sums are of a single matrix"
        parts = (self.values, *(each.held for each in self.grouped.values()), self.input_scale)
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
            assert self.scheme is not None
            if kind == "zero":
                tensor = tensor.float() - (INT4_ZERO if self.scheme.values == "int4" else 0)
            rows = self._by_output(tensor, place.stop - place.start, self.grouped[kind].num_groups)
            self.grouped[kind].put(rows, index, place.start, span, lane)
            if "zeros" in self.grouped:
                scales, zeros = self.grouped["scale"].held[index], self.grouped["zero"].held[index]
                torch.mul(zeros, scales, out=self.grouped["zeros"].held[index])

    def _by_output(self, tensor: Tensor, rows: int, groups: int) -> Tensor:
        """[rows, groups]."""
        assert self.scheme is not None
        if self.scheme.scales == "block":
            assert self.scheme.group_size is not None
            tensor = tensor.repeat_interleave(self.scheme.group_size, dim=0)[:rows]
        return tensor.view(-1, groups).expand(rows, -1)


def _allocate_grouped(
    kernels: Kernels, count: int, outputs: int, columns: int, scheme: QuantScheme
) -> dict[str, Grouped]:
    groups = -(-columns // scheme.group_size) if scheme.group_size else 1
    scale = _SCALES[scheme.scale_format]
    kinds = {"scale": (groups, scale)}
    if scheme.zero_points == "minima":
        kinds["minimum"] = (groups, scale)
    elif scheme.zero_points:
        kinds |= dict.fromkeys(("scale", "zero", "zeros"), (groups, torch.float32))
    if scheme.super_group_size:
        upper = (-(-columns // scheme.super_group_size), torch.float16)
        kinds |= {f"super_{kind}": upper for kind in tuple(kinds)}
    return {kind: Grouped.allocate(kernels, count, outputs, *each) for kind, each in kinds.items()}
