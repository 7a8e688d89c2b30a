"""GGUF's block types as schemes: which one holds a type's values exactly, which one holds several types' together, and
the canonical parts of rows in a scheme.

Types with minima become float zero points, minimum / scale in float32: dequantized, a weight is then within 2^-21 of
the greater of its group's minimum and range from what ggml computes. The other types are exact.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.gguf.block_types import RARE, BlockType
from anychip.plugin_api import INT4_ZERO, NAMED, QuantScheme
from anychip.plugin_api.quantization import ValueFormat
from anychip.weights.blocks import IQ4_NUMBERS, Blocks, unpack


def _grouped(values: ValueFormat, size: int, *, minima: bool = False) -> QuantScheme:
    return QuantScheme(values=values, scales="group", group_size=size, zero_points="float" if minima else None)


_IQ4 = QuantScheme(values="codebook", scales="group", group_size=32, codebook=tuple(map(float, IQ4_NUMBERS)))
AT_LOAD = NAMED["int8"]
"""Of rare types: rounded to one scale for a row."""

SCHEME_OF: dict[str, QuantScheme] = {
    "Q4_0": _grouped("int4", 32),
    "Q4_1": _grouped("int4", 32, minima=True),
    "Q5_0": _grouped("int8", 32),
    "Q5_1": _grouped("int8", 32, minima=True),
    "Q8_0": _grouped("int8", 32),
    "Q2_K": _grouped("int4", 16, minima=True),
    "Q3_K": _grouped("int4", 16),
    "Q4_K": _grouped("int4", 32, minima=True),
    "Q5_K": _grouped("int8", 32, minima=True),
    "Q6_K": _grouped("int8", 16),
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    "MXFP4": NAMED["mxfp4"],
    **dict.fromkeys(RARE, AT_LOAD),
}
"""By a block type's name."""


def scheme_of_all(types: Collection[str | None]) -> QuantScheme | None:
    """The one scheme of matrices that are one product here; None stands for a plain one, and for plain ones the result.
    Files often store one of them finer than the others."""
    if None in types:
        return None
    schemes = [SCHEME_OF[name] for name in types if name is not None]
    if AT_LOAD in schemes or all(scheme == schemes[0] for scheme in schemes):
        return AT_LOAD if AT_LOAD in schemes else schemes[0]
    # Every type's numbers are integers of eight bits, of either kind of four bits too.
    return _grouped(
        "int4" if all(scheme.values == "int4" for scheme in schemes) else "int8",
        min(scheme.group_size or 32 for scheme in schemes),
        minima=any(scheme.zero_points for scheme in schemes),
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """Of whole rows, as plugin_api.QuantScheme describes them."""

    values: Tensor  # [rows, columns]
    scale: Tensor  # [rows, groups]
    zero: Tensor | None  # [rows, groups]


def parts_of(stored: BlockType, rows: Tensor, scheme: QuantScheme) -> Parts:
    """`rows` uint8 [n, bytes of a row], `scheme` the type's own or one of several types'."""
    blocks = unpack(stored, rows)
    count = len(rows)
    if scheme.values == "fp4_e2m1":
        assert blocks.exponents is not None, stored.name
        return Parts(blocks.codes.view(count, -1), blocks.exponents.reshape(count, -1), None)
    if scheme.values == "codebook":
        return Parts(blocks.codes.view(count, -1), blocks.scales.view(count, -1), None)
    values, scale, zero = _integers(blocks, scheme)
    assert scheme.group_size is not None, scheme.name
    repeated = values.shape[1] // scale.shape[1] // scheme.group_size

    def by_group(held: Tensor) -> Tensor:
        by_row = held.reshape(count, -1)
        return by_row if repeated == 1 else by_row.repeat_interleave(repeated, dim=1)

    return Parts(values.reshape(count, -1), by_group(scale), None if zero is None else by_group(zero))


def _integers(blocks: Blocks, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """By block: values, and scales and zeros for each of its groups."""
    values, scale = blocks.integers(), blocks.scales
    minima = blocks.minima
    offset = INT4_ZERO if scheme.values == "int4" and minima is None else 0
    if minima is None:
        zero = torch.full_like(scale, float(offset)) if scheme.zero_points else None
    else:
        # A group of one number has scale 0, which no zero point makes up for: it becomes (0 - -1) * number.
        flat = scale == 0
        zero = torch.where(flat, -1.0, minima / scale)
        if bool(flat.any()):
            scale = torch.where(flat, -minima, scale)
            each = values.shape[1] // scale.shape[1]
            values = torch.where(flat.repeat_interleave(each, dim=1), 0, values)
    dtype = torch.uint8 if scheme.values == "int4" else torch.int8
    return (values + offset).to(dtype), scale, zero
