"""A product of each row with the matrix of its expert, where rows are sorted by expert.

Follows the idea of block-sparse expert products (MegaBlocks, arXiv 2211.15841): tiles of rows are fixed, and a tile in
which several experts meet is visited once for each of them, with a mask. No expert is padded to the largest count.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from anychip_tpu.pallas.budget import Buffer, check_vmem, round_up, sublane_rows
from anychip_tpu.pallas.generations import Generation
from anychip_tpu.pallas.tiles import inner_block, outer_block, product, summed

Array = jax.Array
_MOST_ROWS, _MOST_OUT, _MOST_IN = 128, 512, 2048


class Visits(NamedTuple):
    """Pairs of a tile of rows and an expert that has rows in it, in the rows' order. [tiles + experts]"""

    tile: Array
    expert: Array  # among those that are here
    begin: Array  # the expert's first row
    end: Array
    opens: Array  # 1 for the first visit of a tile
    num_visits: Array  # [1]


def plan_visits(group_sizes: Array, first_group: Array | int, num_here: int, num_rows: int, tile_rows: int) -> Visits:
    """group_sizes [num_experts] counts rows by expert; experts first_group .. first_group + num_here are here."""
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    begins = ends - group_sizes
    begins = lax.dynamic_slice_in_dim(begins, first_group, num_here).astype(jnp.int32)
    ends = lax.dynamic_slice_in_dim(ends, first_group, num_here)
    tiles = jnp.where(ends > begins, (ends - 1) // tile_rows - begins // tile_rows + 1, 0)
    last = jnp.cumsum(tiles)
    count = -(-num_rows // tile_rows) + num_here
    visit = jnp.arange(count, dtype=jnp.int32)
    expert = jnp.searchsorted(last, visit, side="right", method="compare_all").astype(jnp.int32)
    expert = jnp.minimum(expert, num_here - 1)
    tile = begins[expert] // tile_rows + visit - (last - tiles)[expert]
    # Visits behind the last repeat its blocks, so that nothing is fetched for them.
    valid = visit < last[-1]
    stay = jnp.maximum(last[-1] - 1, 0)
    tile, expert = jnp.where(valid, tile, tile[stay]), jnp.where(valid, expert, expert[stay])
    before = jnp.concatenate([jnp.full(1, -1, tile.dtype), tile[:-1]])
    return Visits(
        tile=jnp.maximum(tile, 0),
        expert=expert,
        begin=jnp.where(valid, begins[expert], 0),
        end=jnp.where(valid, ends[expert], 0),
        opens=(tile != before).astype(jnp.int32),
        num_visits=last[-1:].astype(jnp.int32),
    )


def grouped_matmul(
    x: Array,
    weights: Array,
    group_sizes: Array,
    *,
    chip: Generation,
    scales: Array | None = None,
    first_group: Array | int = 0,
    interpret: Any = False,
) -> Array:
    """[num_rows, N]: row i of x [num_rows, K] times weights[e].T, where e is the row's expert.

    weights [num_here, N, K] in x's dtype, or int8 or fp8 with scales [num_here, N]; group_sizes [num_experts] int32, of
    rows by expert; first_group: the first expert whose weights are here. Rows of experts that are elsewhere, and rows
    behind the last expert's, give zeros. Raises Unsupported if the chip's VMEM is too small.
    """
    (num_rows, depth), (num_here, width, _) = x.shape, weights.shape
    tile_rows = min(_MOST_ROWS, round_up(num_rows, sublane_rows(x.dtype.itemsize)))
    out_block, in_block = outer_block(width, _MOST_OUT), inner_block(depth, _MOST_IN)
    limit = check_vmem(
        "grouped matrix product",
        [
            Buffer("rows", (tile_rows, in_block), x.dtype.itemsize, 2),
            Buffer("weights", (out_block, in_block), weights.dtype.itemsize, 2),
            Buffer("weights as they are multiplied", (out_block, in_block), x.dtype.itemsize),
            Buffer("outputs", (tile_rows, out_block), x.dtype.itemsize, 2),
            Buffer("sums", (tile_rows, out_block), 4, 2),
        ],
        chip,
        "shard the experts' width over more chips",
    )
    visits = plan_visits(group_sizes, first_group, num_here, num_rows, tile_rows)
    in_specs = [
        pl.BlockSpec((tile_rows, in_block), lambda n, i, k, tile, *_: (tile[i], k)),
        pl.BlockSpec((1, out_block, in_block), lambda n, i, k, tile, expert, *_: (expert[i], n, k)),
    ]
    inputs = [x, weights]
    if scales is not None:
        in_specs.append(pl.BlockSpec((1, 1, out_block), lambda n, i, k, tile, expert, *_: (expert[i], 0, n)))
        inputs.append(scales.astype(jnp.float32)[:, None])
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(visits),
        grid=(-(-width // out_block), visits.tile.shape[0], depth // in_block),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((tile_rows, out_block), lambda n, i, k, tile, *_: (tile[i], n)),
        scratch_shapes=[pltpu.VMEM((tile_rows, out_block), jnp.float32)],
    )
    out = pl.pallas_call(
        partial(_kernel, tile_rows, scales is not None),
        out_shape=jax.ShapeDtypeStruct((num_rows, width), x.dtype),
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=limit
        ),
        cost_estimate=_cost(x, weights, group_sizes.shape[0]),
        interpret=interpret,
        name="anychip_grouped_matmul",
    )(*visits, *inputs)
    # Tiles without a visit were never written.
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    here = lax.dynamic_slice_in_dim(ends, first_group, num_here)
    begin = lax.dynamic_slice_in_dim(ends - group_sizes, first_group, num_here)[0]
    row = jnp.arange(num_rows)[:, None]
    return jnp.where((row >= begin) & (row < here[-1]), out, 0)


def _cost(x: Array, weights: Array, num_groups: int) -> pl.CostEstimate:
    """Where rows are spread evenly over experts, as far as those that are here."""
    (num_rows, depth), (num_here, width, _) = x.shape, weights.shape
    rows = num_rows * num_here // num_groups
    touched = min(num_here, rows)
    moved = (num_rows * depth + rows * width) * x.dtype.itemsize + touched * width * depth * weights.dtype.itemsize
    return pl.CostEstimate(flops=2 * rows * depth * width, bytes_accessed=moved, transcendentals=0)


def _kernel(tile_rows: int, scaled: bool, *refs: Any) -> None:
    visits, (x, weights, *rest) = Visits(*refs[:6]), refs[6:]
    scales = rest.pop(0) if scaled else None
    out, sums = rest
    i, k = pl.program_id(1), pl.program_id(2)

    @pl.when(i < visits.num_visits[0])
    def _() -> None:
        @summed(k, product(x[...], weights[0].astype(x.dtype)), sums)
        def _() -> None:
            total = sums[...] if scales is None else sums[...] * scales[0]
            row = visits.tile[i] * tile_rows + lax.broadcasted_iota(jnp.int32, total.shape, 0)
            inside = (row >= visits.begin[i]) & (row < visits.end[i])
            others = jnp.where(visits.opens[i] == 1, jnp.zeros_like(total), out[...].astype(jnp.float32))
            out[...] = jnp.where(inside, total, others).astype(out.dtype)
