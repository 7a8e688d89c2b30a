"""Which product serves a matrix on which generation, and why. Imports neither torch nor the vendor's runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anychip.plugin_api import LinearSpec, QuantScheme
from anychip_ascend.generations import TOKEN_QUANT, Generation

_NZ_STEP = {"float16": 16, "bfloat16": 16, "int8": 32}
"""Elements of 32 bytes: what a row of a block of FRACTAL_NZ holds."""

_ROW_STEP = 16
_MOST = 65535
"""Of either side of a quantized product."""

_LEAST_GROUP = 32
_INT4_STEP = 8


@dataclass(frozen=True, slots=True)
class LinearChoice:
    """`widened`: dequantized at load, for the dense product."""

    op: Literal["matmul", "npu_quant_matmul", "npu_weight_quant_batchmatmul", "widened", "reference"]
    nz: bool
    why: str


def choose_linear(spec: LinearSpec, generation: Generation, *, nz: bool) -> LinearChoice:
    """`nz`: whether weights may lie in FRACTAL_NZ at all."""
    scheme = spec.scheme
    if scheme is None:
        blocks = nz and fits_nz(spec.dtype, spec.out_features, spec.in_features)
        return LinearChoice("matmul", blocks, "in blocks of 16 by 16" if blocks else "sizes or dtype that NZ has not")
    if why := _why_not_int8(spec, scheme, generation) if scheme.name == "int8-w8a8" else "":
        return LinearChoice("reference", False, why)
    if scheme.name == "int8-w8a8":
        blocks = nz and fits_nz("int8", spec.in_features, spec.out_features)
        return LinearChoice("npu_quant_matmul", blocks, "a scale for each row and channel")
    if scheme.activations != "plain":
        return LinearChoice("reference", False, f"{scheme.name}: the vendor rounds activations to int8 by row")
    why = _why_not_narrow(spec, scheme, generation)
    return LinearChoice("widened", False, why) if why else LinearChoice("npu_weight_quant_batchmatmul", False, "narrow")


def fits_nz(dtype: str, rows: int, columns: int) -> bool:
    """Whether a matrix fills blocks of FRACTAL_NZ without rest: what is padded there costs memory and time."""
    step = _NZ_STEP.get(dtype)
    return step is not None and rows % _ROW_STEP == 0 and columns % step == 0


def _why_not_int8(spec: LinearSpec, scheme: QuantScheme, generation: Generation) -> str:
    if TOKEN_QUANT in generation.lacks:
        return f"{generation.name} has no {TOKEN_QUANT}"
    if spec.dtype == "float32":
        return "npu_quant_matmul gives float16 and bfloat16"
    if scheme.scales not in ("channel", "tensor") or scheme.activations != "token":
        return f"scales by {scheme.scales}, activations by {scheme.activations}: npu_quant_matmul has channels and rows"
    if max(spec.in_features, spec.out_features) > _MOST:
        return f"a side longer than {_MOST}"
    return ""


def _why_not_narrow(spec: LinearSpec, scheme: QuantScheme, generation: Generation) -> str:
    """Why npu_weight_quant_batchmatmul does not take a scheme; "" where it does."""
    fits = scheme.values in ("int8", "int4") and scheme.zero_points in (None, "int")
    if not fits or scheme.scale_format != "float32":
        return f"{scheme.name}: the op has int8 and int4 with float scales"
    if spec.dtype == "float32" or (generation.name == "310P" and spec.dtype != "float16"):
        return f"the op takes no {spec.dtype} activations"
    if generation.name == "310P" and (scheme.values != "int8" or scheme.group_size):
        return "310P has int8 by channel"
    if max(spec.in_features, spec.out_features) > _MOST:
        return f"a side longer than {_MOST}"
    if scheme.scales == "block":
        return "the op has no scales by block"
    if scheme.values == "int4" and spec.out_features % _INT4_STEP:
        return f"{spec.out_features} channels: eight values of four bits share an int32"
    size = scheme.group_size
    if size is not None and (size % _LEAST_GROUP or not _LEAST_GROUP <= size < spec.in_features):
        return f"groups of {size} columns of {spec.in_features}: the op takes multiples of 32 below that"
    return ""
