"""What kernels of matrix products share: sizes of blocks, a block's product, and the sum over blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

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


def product(x: Any, weights: Any, *, axis: int = 1, dtype: Any = jnp.float32) -> Any:
    """x [rows, K] times weights, whose dimension `axis` is K, summed in `dtype`."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, weights, dims, precision=precision, preferred_element_type=dtype)


def summed(k: Any, block: Any, sums: Any) -> Callable[[Callable[[], None]], None]:
    """Adds a block's product to `sums`, in the block `k` along the grid's third axis. Decorates what is to be done with
    the whole sum, once it is there."""

    @pl.when(k == 0)
    def _() -> None:
        sums[...] = block

    @pl.when(k > 0)
    def _() -> None:
        sums[...] += block

    return pl.when(k == pl.num_programs(2) - 1)
