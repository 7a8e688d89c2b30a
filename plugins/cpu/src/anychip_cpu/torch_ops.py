"""Operators of torch that have a kernel of the same bits: recorded, they are part of the piece around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from anychip_cpu.native import DTYPES, Kernels

_aten = torch.ops.aten
_ADD, _MULTIPLY, _SCALE, _CONVERT, _LESS, _SELECT, _WIDEN = range(7)
"""kernels/tensors.h's Elementwise::Op."""

_CODES = {torch.float32: DTYPES["float32"], torch.bfloat16: DTYPES["bfloat16"]}
Call = Callable[[Tensor, tuple[Any, ...], Mapping[str, Any]], "Written | None"]
Written = Callable[[Kernels, Tensor, bool], None]
"""Calls the kernel that writes an operator's result into a tensor; whole, or as many rows as a step has tokens."""


def as_kernel(
    func: Any, result: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, whole: bool
) -> Written | None:
    """What writes the result of func(*args, **kwargs), which torch gave as `result`; None: no kernel does."""
    known = None if whole and func in _BY_INDEX else _KNOWN.get(func)
    return None if known is None or not result.is_contiguous() or not result.numel() else known(result, args, kwargs)


def _elementwise(
    op: int, a: Tensor, *, b: Tensor | None = None, condition: Tensor | None = None, scalar: float = 0.0
) -> Written:
    def write(kernels: Kernels, out: Tensor, whole: bool) -> None:
        # Integers may be indexes of what torch does for padding too: those of padding must be there.
        rows = out.shape[0] if out.dtype.is_floating_point and not whole else 1
        kernels.elementwise(
            op, _CODES.get(a.dtype, 0), _CODES.get(out.dtype, 0), a.data_ptr(), 0 if b is None else b.data_ptr(),
            0 if condition is None else condition.data_ptr(), out.data_ptr(), rows, out.numel() // rows, float(scalar),
        )  # fmt: skip

    return write


def _alike(result: Tensor, *given: Any) -> bool:
    """Whether all are whole tensors of one shape."""
    return all(isinstance(x, Tensor) and x.shape == result.shape and x.is_contiguous() for x in given)


def _binary(op: int) -> Call:
    def call(result: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Written | None:
        a, b = args
        if result.dtype not in _CODES or kwargs or not isinstance(a, Tensor) or a.dtype != result.dtype:
            return None
        if isinstance(b, Tensor) and _alike(result, a, b) and b.dtype == a.dtype:
            return _elementwise(op, a, b=b)
        scales = op == _MULTIPLY and isinstance(b, int | float) and math.isfinite(b) and _alike(result, a)
        return _elementwise(_SCALE, a, scalar=b) if scales else None

    return call


def _convert(result: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Written | None:
    a = args[0]
    if (a.dtype, result.dtype) == (torch.int32, torch.int64) and _alike(result, a):
        return _elementwise(_WIDEN, a)
    fits = {a.dtype, result.dtype} <= _CODES.keys() and _alike(result, a)
    return _elementwise(_CONVERT, a) if fits else None


def _less(result: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Written | None:
    a, limit = args
    fits = a.dtype == torch.int32 and isinstance(limit, int) and _alike(result, a)
    return _elementwise(_LESS, a, scalar=limit) if fits else None


def _select(result: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Written | None:
    condition, a, b = args
    fits = condition.dtype == torch.bool and a.dtype == b.dtype == result.dtype and result.element_size() == 4
    return _elementwise(_SELECT, a, b=b, condition=condition) if fits and _alike(result, *args) else None


def _gather(result: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Written | None:
    source, indices = args[0], args[1]
    index = indices[0]
    if len(indices) != 1 or index is None or index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        return None
    if not source.is_contiguous() or not index.is_contiguous():
        return None
    row_bytes = math.prod(source.shape[1:]) * source.element_size()

    def write(kernels: Kernels, out: Tensor, whole: bool) -> None:
        kernels.gather(
            source.data_ptr(), index.data_ptr(), index.dtype == torch.int64, out.data_ptr(), len(index), len(source),
            row_bytes,
        )  # fmt: skip

    return write


def _replace(result: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Written | None:
    base, dim, index, source = args
    whole = all(tensor.is_contiguous() for tensor in (base, index, source))
    if dim != 0 or not whole or index.dtype != torch.int64 or base.dtype != source.dtype or index.dim() != 1:
        return None
    row_bytes = math.prod(base.shape[1:]) * base.element_size()

    def write(kernels: Kernels, out: Tensor, whole: bool) -> None:
        kernels.replace(
            base.data_ptr(), index.data_ptr(), source.data_ptr(), out.data_ptr(), len(index), len(base), row_bytes
        )

    return write


_KNOWN: Mapping[Any, Call] = MappingProxyType({
    _aten.add.Tensor: _binary(_ADD),
    _aten.mul.Tensor: _binary(_MULTIPLY),
    _aten._to_copy.default: _convert,
    _aten.lt.Scalar: _less,
    _aten.where.self: _select,
    _aten.index.Tensor: _gather,
    _aten.index_copy.default: _replace,
})  # fmt: skip

_BY_INDEX = frozenset({_aten.index.Tensor, _aten.index_copy.default})
"""Always for as many rows as a step has."""
