"""Products with weights of 4 bits in groups along the inner dimension, unpacked in VMEM."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from anychip.plugin_api import Unsupported
from anychip_tpu.pallas.budget import LANES, SUBLANES, Buffer, check_vmem, round_up, sublane_rows
from anychip_tpu.pallas.generations import Generation
from anychip_tpu.pallas.tiles import outer_block, product, summed

Array = jax.Array
_MOST_ROWS, _MOST_OUT, _MOST_IN = 256, 512, 1024


def pack_int4(values: np.ndarray, group: int) -> np.ndarray:
    """Bytes [K / 2, N] int8 of values [K, N] in -8 .. 7. Of a group of rows, the first half is in the low four bits and
    the second half in the high ones, so that unpacking moves no row."""
    depth, width = values.shape
    halves = values.astype(np.int8).reshape(depth // group, 2, group // 2, width)
    packed = (halves[:, 0] & 0x0F) | (halves[:, 1] << 4)
    return packed.reshape(depth // 2, width).astype(np.int8)


def int4_matmul(
    x: Array,
    packed: Array,
    scales: Array,
    zeros: Array | None = None,
    *,
    chip: Generation,
    interpret: Any = False,
) -> Array:
    """[num_rows, N] = x [num_rows, K] times (values - zeros) * scales, in x's dtype.

    packed [K / 2, N] from pack_int4; scales, and zeros where there are any, [K / group, N]. Weights are rounded to x's
    dtype before they multiply. Raises Unsupported for groups that are not whole tiles, or too little VMEM.
    """
    (num_rows, depth), width = x.shape, packed.shape[1]
    group = depth // scales.shape[0]
    if group % (2 * SUBLANES) or depth % group:
        raise Unsupported(
            "anychip-tpu int4 matrix product",
            [f"groups of {group} of {depth} rows are not whole tiles; groups of 32, 64 and 128 are"],
        )
    tile_rows = min(_MOST_ROWS, round_up(num_rows, sublane_rows(x.dtype.itemsize)))
    out_block, in_block = outer_block(width, _MOST_OUT), _inner_block(depth, group)
    limit = check_vmem(
        "int4 matrix product",
        [
            Buffer("rows", (tile_rows, in_block), x.dtype.itemsize, 2),
            Buffer("weights", (in_block // 2, out_block), 1, 2),
            Buffer("weights as they are multiplied", (in_block, out_block), 4, 2),
            Buffer("scales and zeros", (in_block // group, out_block), 4, 4),
            Buffer("outputs", (tile_rows, out_block), x.dtype.itemsize, 2),
            Buffer("sums", (tile_rows, out_block), 4, 2),
        ],
        chip,
        "shard the weight over more chips",
    )
    by_group = pl.BlockSpec((in_block // group, 1, out_block), lambda m, n, k: (k, 0, n))
    inputs = [x, packed, scales.astype(jnp.float32)[:, None]]
    if zeros is not None:
        inputs.append(zeros.astype(jnp.float32)[:, None])
    return pl.pallas_call(
        partial(_kernel, group, zeros is not None),
        out_shape=jax.ShapeDtypeStruct((num_rows, width), x.dtype),
        grid=(-(-num_rows // tile_rows), -(-width // out_block), depth // in_block),
        in_specs=[
            pl.BlockSpec((tile_rows, in_block), lambda m, n, k: (m, k)),
            pl.BlockSpec((in_block // 2, out_block), lambda m, n, k: (k, n)),
            *[by_group] * (len(inputs) - 2),
        ],
        out_specs=pl.BlockSpec((tile_rows, out_block), lambda m, n, k: (m, n)),
        scratch_shapes=[pltpu.VMEM((tile_rows, out_block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        interpret=interpret,
        name="anychip_int4_matmul",
    )(*inputs)


def _inner_block(depth: int, group: int) -> int:
    """Whole groups and whole lanes of x, and packed rows in whole tiles of bytes."""
    for block in range(_MOST_IN - _MOST_IN % LANES, 0, -LANES):
        if depth % block == 0 and block % group == 0:
            return block
    return depth


def _kernel(group: int, shifted: bool, x: Any, packed: Any, scales: Any, *rest: Any) -> None:
    zeros = rest[0] if shifted else None
    out, sums = rest[-2:]
    k = pl.program_id(2)
    both = packed[...].astype(jnp.int32)
    halves = both.reshape(-1, group // 2, both.shape[-1])
    low, high = (halves << 28) >> 28, (halves << 24) >> 28
    values = jnp.concatenate([low, high], axis=1).astype(jnp.float32)  # [groups, group, N]
    if zeros is not None:
        values = values - zeros[...]
    weights = (values * scales[...]).reshape(-1, both.shape[-1]).astype(x.dtype)

    @summed(k, product(x[...], weights, axis=0), sums)
    def _() -> None:
        out[...] = sums[...].astype(out.dtype)
