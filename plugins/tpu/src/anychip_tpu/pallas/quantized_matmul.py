"""Products with weights of 8 bits: with activations of 8 bits as well (W8A8), or of 16 (weights alone)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from anychip.plugin_api import Unsupported
from anychip_tpu.pallas.budget import Buffer, check_vmem, round_up, sublane_rows
from anychip_tpu.pallas.generations import GENERATIONS, Generation
from anychip_tpu.pallas.tiles import inner_block, outer_block, product, summed

Array = jax.Array
_MOST_ROWS, _MOST_OUT, _MOST_IN = 256, 512, 2048
_KINDS = {"int8": "int8", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def quantize_rows(x: Array, dtype: str) -> tuple[Array, Array]:
    """Each row of x [num_rows, K] in 8 bits, and its scale [num_rows] float32: its largest magnitude becomes the
    largest number of the dtype. A row of zeros has scale 1."""
    exact = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=1)
    scale = jnp.where(largest > 0, largest / _LARGEST[dtype], 1.0)
    scaled = exact / scale[:, None]
    if dtype == "int8":
        scaled = jnp.clip(jnp.round(scaled), -127, 127)
    return scaled.astype(dtype), scale


def quantized_matmul(
    x: Array,
    weights: Array,
    weight_scales: Array,
    *,
    chip: Generation,
    row_scales: Array | None = None,
    out_dtype: Any = jnp.bfloat16,
    interpret: Any = False,
) -> Array:
    """[num_rows, N] = x [num_rows, K] times weights [N, K] transposed, scaled back.

    weight_scales [N]. With row_scales [num_rows], x has the weights' dtype (quantize_rows gives both) and the product
    is one of 8 bits, in int32 or float32; without, x is bfloat16 or float32 and weights are widened in VMEM. Raises
    Unsupported if the chip takes no such product, or its VMEM is too small.
    """
    (num_rows, depth), width = x.shape, weights.shape[0]
    if row_scales is not None:
        _check_native(str(weights.dtype), chip)
    tile_rows = min(_MOST_ROWS, round_up(num_rows, sublane_rows(x.dtype.itemsize)))
    out_block, in_block = outer_block(width, _MOST_OUT), inner_block(depth, _MOST_IN)
    limit = check_vmem(
        "quantized matrix product",
        [
            Buffer("rows", (tile_rows, in_block), x.dtype.itemsize, 2),
            Buffer("weights", (out_block, in_block), weights.dtype.itemsize, 2),
            Buffer("weights as they are multiplied", (out_block, in_block), x.dtype.itemsize),
            Buffer("outputs", (tile_rows, out_block), 4, 2),
            Buffer("sums", (tile_rows, out_block), 4, 2),
            Buffer("scales of rows", (tile_rows, 1), 4, 2),
        ],
        chip,
        "shard the weight over more chips",
    )
    integer = row_scales is not None and weights.dtype == jnp.int8
    in_specs = [
        pl.BlockSpec((tile_rows, in_block), lambda m, n, k: (m, k)),
        pl.BlockSpec((out_block, in_block), lambda m, n, k: (n, k)),
        pl.BlockSpec((1, out_block), lambda m, n, k: (0, n)),
    ]
    inputs = [x, weights, weight_scales.astype(jnp.float32)[None]]
    if row_scales is not None:
        in_specs.append(pl.BlockSpec((tile_rows, 1), lambda m, n, k: (m, 0)))
        inputs.append(row_scales.astype(jnp.float32)[:, None])
    return pl.pallas_call(
        partial(_kernel, row_scales is not None),
        out_shape=jax.ShapeDtypeStruct((num_rows, width), out_dtype),
        grid=(-(-num_rows // tile_rows), -(-width // out_block), depth // in_block),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((tile_rows, out_block), lambda m, n, k: (m, n)),
        scratch_shapes=[pltpu.VMEM((tile_rows, out_block), jnp.int32 if integer else jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        interpret=interpret,
        name="anychip_quantized_matmul",
    )(*inputs)


def _check_native(dtype: str, chip: Generation) -> None:
    kind = _KINDS[dtype]
    if kind in chip.dtypes:
        return
    able = [generation.name for generation in GENERATIONS.values() if kind in generation.dtypes]
    raise Unsupported(
        "anychip-tpu quantized matrix product",
        [
            f"{chip.name} multiplies no {kind} by {kind}, {', '.join(able)} do; quantize weights alone, which every "
            "generation takes"
        ],
    )


def _kernel(rows_are_scaled: bool, x: Any, weights: Any, weight_scales: Any, *rest: Any) -> None:
    row_scales = rest[0] if rows_are_scaled else None
    out, sums = rest[-2:]
    k = pl.program_id(2)
    other = weights[...] if rows_are_scaled else weights[...].astype(x.dtype)

    @summed(k, product(x[...], other, dtype=sums.dtype), sums)
    def _() -> None:
        total = sums[...].astype(jnp.float32) * weight_scales[...]
        out[...] = (total if row_scales is None else total * row_scales[...]).astype(out.dtype)
