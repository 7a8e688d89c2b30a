"""Small floats with a small scale for each group, as checkpoints store them: what the containers of MXFP4, MXFP8 and
NVFP4 share. Four-bit ones, e2m1, lie two to a byte, the even column in the low half.

Their activations, where a checkpoint quantizes those too, stay as they are here: finer than what it was
made for, and the same weights. Sources: OCP, "Microscaling Formats (MX) v1.0"; NVIDIA, "Introducing NVFP4", 2025.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anychip.errors import CheckpointError, ConfigError
from anychip.plugin_api import NAMED, QuantScheme, WeightView
from anychip.quantization.format import column_groups
from anychip.weights.matrix import Matrix, read_one, row_chunks
from anychip.weights.register import WeightRegister

_NAN_EXPONENT = 255


def grouped_floats(name: str, module: str, in_features: int, size: int) -> QuantScheme:
    """Scheme `name` with groups of `size`. Raises ConfigError where that does not divide the input features."""
    if size <= 0 or size % 2 or in_features % size:
        raise ConfigError(f"{module} has {in_features} input features, which groups of {size} do not divide")
    return replace(NAMED[name], group_size=size)


def pairs(held: Tensor) -> Tensor:
    """Codes [..., 2 n] of bytes [..., n]."""
    return torch.stack((held & 15, held >> 4), dim=-1).flatten(-2)


def exponents(held: Tensor, source: str) -> Tensor:
    """Scales of one byte, as they are. Raises CheckpointError for one that is not a number."""
    held = held.view(torch.uint8)
    if bool((held == _NAN_EXPONENT).any()):
        raise CheckpointError(f"{source} holds a scale that is not a number (exponent {_NAN_EXPONENT})")
    return held


def want_pairs(register: WeightRegister, matrix: Matrix, name: str) -> None:
    """Tensor `name`, uint8 [rows, columns / 2]."""
    rows, columns = matrix.shape
    first, last = (bound // 2 for bound in matrix.columns.bounds)

    def take(view: WeightView) -> None:
        check(view, (rows, columns // 2), torch.uint8)
        for start, stop in row_chunks(matrix.rows, columns):
            matrix.put("", pairs(view.read((start, stop), (first, last))), start - matrix.rows.start)

    register.want(name, None, take)


def want_exponents(register: WeightRegister, matrix: Matrix, scheme: QuantScheme, name: str) -> None:
    """Tensor `name`, a power of two for each group: uint8 or e8m0 [rows, groups]."""
    groups, shape = column_groups(matrix, scheme), _scales_of(matrix, scheme)

    def take(view: WeightView) -> None:
        check(view, shape, torch.uint8, torch.float8_e8m0fnu)
        matrix.put("scale", exponents(view.read(matrix.rows.bounds, groups.bounds), view.source))

    register.want(name, None, take)


def want_two_scales(
    register: WeightRegister, matrix: Matrix, scheme: QuantScheme, name: str, whole: str, *, divides: bool
) -> None:
    """Tensor `name`, e4m3 [rows, groups], and tensor `whole` of one float32, which multiplies them or divides."""
    groups, shape = column_groups(matrix, scheme), _scales_of(matrix, scheme)

    def take(view: WeightView) -> None:
        check(view, shape, torch.float8_e4m3fn)
        matrix.put("scale", view.read(matrix.rows.bounds, groups.bounds))

    def take_whole(view: WeightView) -> None:
        given = read_one(view)
        if not bool(given.isfinite().all()) or (divides and float(given) == 0):
            raise CheckpointError(f"{view.source} is {float(given)}: no scale of a whole matrix")
        matrix.put("global_scale", given.reciprocal() if divides else given)

    register.want(name, None, take)
    register.want(whole, None, take_whole)


def _scales_of(matrix: Matrix, scheme: QuantScheme) -> tuple[int, int]:
    assert scheme.group_size is not None
    return matrix.shape[0], matrix.shape[1] // scheme.group_size


def check(view: WeightView, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raises CheckpointError for a tensor of another shape, or of none of the dtypes: the register knows no dtypes, and
    what it is told the shape of may be made up."""
    if view.shape != shape:
        raise CheckpointError(f"{view.source} has shape {list(view.shape)}, the scheme wants {list(shape)}")
    if view.dtype not in dtypes:
        raise CheckpointError(f"{view.source} is {view.dtype}, and the format has {' or '.join(map(str, dtypes))}")
