"""Sizes of blocks of matrix products."""

from __future__ import annotations

from anychip_tpu.pallas.budget import LANES


def inner_block(size: int, most: int) -> int:
    """A block of the dimension that is summed over: the largest divisor of whole lanes up to `most`, else all of it,
    since what lies behind the end of an array must not enter a sum."""
    for block in range(most - most % LANES, 0, -LANES):
        if size % block == 0:
            return block
    return size


def outer_block(size: int, most: int) -> int:
    """A block of a dimension whose last block may reach behind the end; all of it if it is short."""
    return size if size <= most else most
