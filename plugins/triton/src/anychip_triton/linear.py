"""Matrix products on Triton kernels."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from anychip.ops.reference import DenseWeights, ReferenceLinear, WidenedLinear, can_widen, reference_linear
from anychip.ops.reference.linear import QuantizedWeights, ReferenceQuantizedLinear
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import Activation, LinearKernel, LinearSpec, Platform, QuantScheme
from anychip_triton.formats import KINDS, accepted, split_rows
from anychip_triton.kernels.matmul import NARROW_COLUMNS, matmul, quantize_rows
from anychip_triton.kernels.widen import widen
from anychip_triton.launch import Launcher, split_tile
from anychip_triton.library import library_product
from anychip_triton.ops import TritonOps
from anychip_triton.shapes import power_of_two, rows_of
from anychip_triton.targets import Target

SKINNY_ROWS = 16
"""Rows up to which a dense product is the Triton kernel's; above, the vendor's library does it."""

WIDENED_ROWS = {"int4": 8, "int8": 64}
"""Rows above which weights without activations of 8 bits are widened first, and multiplied by the vendor's library."""

EPILOGUES: frozenset[str] = frozenset(get_args(Activation))
"""Activations of gate and up that a dense product applies."""

_KINDS = {"int8": "int8", "int8-w8a8": "int8", "int4": "int4", "fp8": "fp8", "fp8-w8a16": "fp8"}
"""Of a scheme's weights, as kernels name them; no other scheme is theirs."""

_LEAST_BLOCK_K = 16
_NEGATIVE_ZERO = 0x80
_ROW_SCALES = {"token": "token", "group": "group", "static": "one"}


def linear_kernel(spec: LinearSpec, platform: Platform, launch: Launcher, *, formats: bool = True) -> LinearKernel:
    """The fastest kernel for a spec. `formats`: the op before it can write activations of 8 bits."""
    if spec.scheme is None:
        return TritonLinear(spec, platform, launch)
    if why_not(spec.scheme):
        if can_widen(spec.scheme):
            return WidenedLinear(spec, platform, lambda plain: TritonLinear(plain, platform, launch))
        return reference_linear(spec, platform)
    return TritonQuantizedLinear(spec, platform, launch, formats=formats)


def why_not(scheme: QuantScheme) -> str:
    """Why the kernels do not serve a scheme; "" where they do."""
    if scheme.name not in _KINDS:
        return f"{scheme.name}: the kernels read {', '.join(_KINDS)}"
    least = 2 * _LEAST_BLOCK_K if scheme.bits == 4 else _LEAST_BLOCK_K
    size = scheme.group_size
    if size is not None and size % least:
        return f"groups of {size}: the kernels take multiples of {least}"
    return ""


def block_k(wanted: int, group: int | None) -> int:
    """The largest block of columns up to `wanted` that divides the groups."""
    while group is not None and group % wanted:
        wanted //= 2
    return wanted


class TritonLinear(ReferenceLinear):
    """Dense. Few rows are bound by reading weights, many by the matrix units, where the vendor's library is ahead."""

    name = "triton"

    def __init__(self, spec: LinearSpec, platform: Platform, launch: Launcher) -> None:
        super().__init__(spec, platform)
        self._launch = launch
        self._everywhere = launch.target.backend == "interpreter"

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        epilogue = self.spec.epilogue
        if x.shape[0] > SKINNY_ROWS and not self._everywhere:
            if epilogue is None:
                return library_product(x, packed.weight, packed.bias, out=out)
            gate_up = library_product(x, packed.weight, packed.bias)
            result = TritonOps(self._launch).gated_activation(gate_up=gate_up, activation=epilogue)
            return result if out is None else out.copy_(result)
        return launch_matmul(self._launch, rows_of(x), packed.weight, packed.bias, out=out, activation=epilogue or "")


class TritonQuantizedLinear(ReferenceQuantizedLinear):
    """Weights stay as narrow as they are stored; they are widened in registers, or multiplied as they are."""

    name = "triton-quantized"

    def __init__(self, spec: LinearSpec, platform: Platform, launch: Launcher, *, formats: bool = True) -> None:
        super().__init__(spec, platform)
        self._launch = launch
        if formats:
            self._accepts = accepted(spec)

    def _load(self, packed: QuantizedWeights, kind: str, tensor: Tensor, offset: int, rows: int, row: int) -> None:
        super()._load(packed, kind, storable(tensor, kind, self._launch.target), offset, rows, row)

    def apply(self, x: Tensor, packed: QuantizedWeights, *, out: Tensor | None = None) -> Tensor:
        """x is plain, or as `accepts` says."""
        matrix = packed.matrix
        if x.shape[0] > WIDENED_ROWS.get(matrix.scheme.name, x.shape[0]):
            return library_product(x, widened(self._launch, matrix, x.dtype), packed.bias, out=out)
        if x.dtype == torch.uint8:
            kind = KINDS[matrix.scheme.name]
            held, scales = split_rows(rows_of(x), self.spec.in_features, self.accepts)
        else:
            held, scales, kind = quantized_activations(self._launch, rows_of(x), matrix)
        return launch_matmul(
            self._launch, held, matrix.values, packed.bias, out=out, x_kind=kind, matrix=matrix, x_scale=scales,
            dtype=getattr(torch, self.spec.dtype),
        )  # fmt: skip


def weights_problem(scheme: QuantScheme | None) -> dict[str, int]:
    """What a tile depends on of a product's weights: whether they are quantized, their bits, and whether scales change
    along a row."""
    if scheme is None:
        return {"quantized": 0, "bits": 16, "grouped": 0}
    return {"quantized": 1, "bits": scheme.bits, "grouped": int(scheme.group_size is not None)}


def weight_kind(scheme: QuantScheme) -> str:
    return _KINDS[scheme.name]


def storable(tensor: Tensor, kind: str, target: Target) -> Tensor:
    """What a part's values are on a target: its 8-bit floats may have no negative zero."""
    if kind or target.fp8 != "fnuz" or tensor.dtype != torch.float8_e4m3fn:
        return tensor
    held = tensor.view(torch.uint8)
    return held.masked_fill(held == _NEGATIVE_ZERO, 0).view(tensor.dtype)


def quantized_activations(launch: Launcher, x: Tensor, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor | None, str]:
    """Activations as a scheme's product takes them: the tensor, its scales and its kind."""
    scheme = matrix.scheme
    if scheme.activations == "plain":
        return x, None, "plain"
    kind = KINDS[scheme.name]
    rows, columns = x.shape
    static = scheme.activations == "static"
    group = scheme.group_size if scheme.activations == "group" and scheme.group_size else columns
    groups = -(-columns // group)
    if static:
        assert matrix.input_scale is not None
        scales = matrix.input_scale
    else:
        scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    held = torch.empty((rows, columns), dtype=torch.int8 if kind == "int8" else torch.uint8, device=x.device)
    tile = launch.tiles.tile("quantize_rows", width=group)
    launch(
        quantize_rows, (rows, groups), split_tile(tile)[1],
        out=held, scales=scales, x=x, columns=columns, groups=groups, x_stride=x.stride(0), GROUP=group,
        BLOCK=power_of_two(group), KIND=kind, STATIC=static,
    )  # fmt: skip
    return held, scales, kind


def widened(launch: Launcher, matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """The numbers that a matrix stands for, [features, columns], each rounded to `dtype`."""
    scheme, (features, columns) = matrix.scheme, matrix.shape
    result = torch.empty((features, columns), dtype=dtype, device=matrix.values.device)
    blocks, options = split_tile(launch.tiles.tile("widen"))
    launch(
        widen, (features, -(-columns // blocks["BLOCK"])), options,
        out=result, w=as_bytes(matrix.values), w_scale=matrix.scales,
        w_zero=matrix.values if matrix.zeros is None else matrix.zeros, columns=columns,
        w_stride=matrix.values.stride(0), w_groups=matrix.scales.shape[1], GROUP=scheme.group_size or 0,
        W_KIND=weight_kind(scheme), HAS_ZERO=scheme.zero_points is not None, **blocks,
    )  # fmt: skip
    return result


def product_arguments(
    launch: Launcher,
    scheme: QuantScheme | None,
    x_kind: str,
    x_scale: Tensor | None,
    blocks: dict[str, int],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What `matmul` and `expert_matmul` are told of a scheme, and their blocks, fitted to its groups. `dtype` is the
    result's."""
    group = None if scheme is None else scheme.group_size
    blocks = blocks | {"BLOCK_K": block_k(blocks["BLOCK_K"], group)}
    activations = "plain" if scheme is None else scheme.activations
    return {
        **blocks,
        "GROUP": group or 0,
        "X_KIND": x_kind,
        "X_SCALES": _ROW_SCALES.get(activations, "none"),
        "x_groups": 0 if x_scale is None or activations == "static" else x_scale.stride(0),
        "W_KIND": "plain" if scheme is None else weight_kind(scheme),
        "HAS_ZERO": scheme is not None and scheme.zero_points is not None,
        # Matrix units add products of 8-bit floats in fewer bits than float32 has, and take no fewer columns.
        "FP8": "" if dtype == torch.float32 or blocks["BLOCK_K"] < NARROW_COLUMNS.value else launch.target.fp8,
    }


def launch_matmul(
    launch: Launcher,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor | None,
    x_kind: str = "plain",
    matrix: QuantizedMatrix | None = None,
    x_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    activation: str = "",
) -> Tensor:
    """x W^T + b, [rows, out_features]; with an activation half as many, of gate and up."""
    rows, columns = x.shape
    features = weight.shape[0] // (2 if activation else 1)
    scheme = None if matrix is None else matrix.scheme
    result = torch.empty((rows, features), dtype=dtype or x.dtype, device=x.device) if out is None else out
    problem = {"rows": rows, "features": features, "columns": columns, "gated": int(bool(activation))}
    tile = launch.tiles.tile("matmul", **problem, item=result.element_size(), **weights_problem(scheme))
    blocks, options = split_tile(tile)
    arguments = product_arguments(launch, scheme, x_kind, x_scale, blocks, result.dtype)
    tiles = -(-rows // arguments["BLOCK_M"]) * -(-features // arguments["BLOCK_N"])
    zeros = None if matrix is None else matrix.zeros
    launch(
        matmul, (tiles,), options,
        out=result, x=x, x_scale=result if x_scale is None else x_scale,
        w=as_bytes(weight), w_scale=result if matrix is None else matrix.scales,
        w_zero=result if zeros is None else zeros, bias=result if bias is None else bias,
        rows=rows, out_features=features, columns=columns, out_stride=result.stride(0), x_stride=x.stride(0),
        w_stride=weight.stride(0), w_groups=0 if matrix is None else matrix.scales.shape[1],
        HAS_BIAS=bias is not None, ACTIVATION=activation, **arguments,
    )  # fmt: skip
    return result


def as_bytes(weight: Tensor) -> Tensor:
    """8-bit floats as bytes, which is how kernels read them; others as they are."""
    return weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight
