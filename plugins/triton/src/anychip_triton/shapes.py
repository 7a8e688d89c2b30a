"""Sizes and strides as kernels take them."""

from __future__ import annotations

from torch import Tensor


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """The same [rows, width], of which each row's values lie next to each other: leading dimensions become one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
