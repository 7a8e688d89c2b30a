"""Ragged paged attention for TPUs: writes a step's keys and values into their pages and attends to all of a row's, in
one kernel call."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from anychip_tpu.pallas.attention_kernel import PageReader, Softmax, Step, write_keys
from anychip_tpu.pallas.attention_schedule import Visits, Writes, plan_visits, plan_writes
from anychip_tpu.pallas.attention_spec import AttentionSpec, Tiling, choose_tiling
from anychip_tpu.pallas.budget import LANES
from anychip_tpu.pallas.generations import Generation

Array = jax.Array
_NUM_VISIT_ARRAYS = len(Visits._fields)


def ragged_paged_attention(
    q: Array,
    k: Array | None,
    v: Array | None,
    pages: Array,
    tables: Array,
    starts: Array,
    lengths: Array,
    slots: Array | None,
    sinks: Array | None = None,
    *,
    spec: AttentionSpec,
    chip: Generation,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """The attended values [num_tokens, num_heads, head_dim], and the pages with this step's keys and values.

    q [num_tokens, num_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim], absent where spec.writes is False;
    pages [num_pages, *spec.page_shape], donated; tables [num_rows, pages_per_row] page numbers; starts [num_rows + 1],
    each row's first token; lengths [num_rows], keys of each row with this step's; slots [num_tokens], -1 for a token
    that is not written; sinks [num_heads].

    Padded rows start where the last row ends. Padded tokens give zeros. Rows with one token do best if they lead the
    batch. Pages may hold anything finite. Raises Unsupported if the chip's memories are too small.
    """
    tiling = choose_tiling(spec, chip)
    visits = plan_visits(spec, starts, lengths, tiling.pages_per_block * spec.page_size)
    inputs: list[Array] = []
    scalars: list[Array] = [*visits, tables.astype(jnp.int32).reshape(-1)]
    if spec.writes:
        scalars += plan_writes(spec, slots, tiling.writes_at_once)
    row_queries, tile_queries = pack_queries(spec, q)
    inputs.append(row_queries)
    if spec.num_tiles:
        inputs.append(tile_queries)
    if spec.sinks:
        inputs.append(_pack_sinks(spec, sinks))
    if spec.writes:
        inputs.append(pack_new(spec, k, v))
    *attended, pages = _call(spec, tiling, scalars, [*inputs, pages], interpret)
    return unpack_outputs(spec, visits.num_decode[0], *attended), pages


def pack_queries(spec: AttentionSpec, q: Array) -> tuple[Array, Array | None]:
    """By row [padded rows, num_kv_heads, padded share, lanes], for rows that lead the batch with one token; and by tile
    [num_kv_heads, share, padded tokens, lanes]."""
    grouped = q.reshape(spec.num_tokens, spec.num_kv_heads, spec.share, spec.head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, spec.lanes - spec.head_dim)))
    num_rows = spec.row_steps * spec.rows_per_step
    leading = _resized(grouped, num_rows)
    leading = jnp.pad(leading, ((0, 0), (0, 0), (0, spec.padded_share - spec.share), (0, 0)))
    if not spec.num_tiles:
        return leading, None
    return leading, _resized(grouped, spec.num_tiles * spec.tile_tokens).transpose(1, 2, 0, 3)


def pack_new(spec: AttentionSpec, k: Array, v: Array) -> Array:
    """[num_kv_heads, parts, tokens, lanes], with room behind for reading two chunks from any token."""
    if spec.joined:
        gap = jnp.zeros((*k.shape[:2], LANES // 2 - spec.head_dim), k.dtype)
        parts = jnp.concatenate([k, gap, v, gap], axis=-1)[:, :, None]
    else:
        parts = jnp.stack([k, v], axis=2)
        parts = jnp.pad(parts, ((0, 0), (0, 0), (0, 0), (0, spec.lanes - spec.head_dim)))
    rows = -(-spec.num_tokens // spec.chunk) * spec.chunk + spec.chunk
    return _resized(parts, rows).transpose(1, 2, 0, 3)


def unpack_outputs(spec: AttentionSpec, num_decode: Array, by_row: Array, by_tile: Array | None = None) -> Array:
    by_row = _resized(by_row[:, :, : spec.share], spec.num_tokens)
    if by_tile is None:
        chosen = by_row
    else:
        decoded = (jnp.arange(spec.num_tokens) < num_decode)[:, None, None, None]
        chosen = jnp.where(decoded, by_row, by_tile.transpose(2, 0, 1, 3)[: spec.num_tokens])
    values = chosen[..., spec.value_lane : spec.value_lane + spec.head_dim]
    return values.reshape(spec.num_tokens, spec.num_heads, spec.head_dim)


def _pack_sinks(spec: AttentionSpec, sinks: Array) -> Array:
    """[num_kv_heads, padded share, LANES] float32"""
    by_head = sinks.astype(jnp.float32).reshape(spec.num_kv_heads, spec.share, 1)
    by_head = jnp.pad(by_head, ((0, 0), (0, spec.padded_share - spec.share), (0, 0)))
    return jnp.broadcast_to(by_head, (spec.num_kv_heads, spec.padded_share, LANES))


def _resized(x: Array, num_rows: int) -> Array:
    """Cut, or padded with zeros, along the first dimension."""
    return jnp.pad(x[:num_rows], ((0, max(0, num_rows - x.shape[0])), *((0, 0),) * (x.ndim - 1)))


def _call(
    spec: AttentionSpec, tiling: Tiling, scalars: list[Array], inputs: list[Array], interpret: Any
) -> tuple[Array, ...]:
    share, lanes, steps = spec.padded_share, spec.lanes, spec.row_steps
    rows = pl.BlockSpec(
        (spec.rows_per_step, spec.num_kv_heads, share, lanes), lambda i, *_: (jnp.minimum(i, steps - 1), 0, 0, 0)
    )
    tiles = pl.BlockSpec(
        (spec.num_kv_heads, spec.share, spec.tile_tokens, lanes), lambda i, *_: (0, 0, jnp.maximum(i - steps, 0), 0)
    )
    whole = pl.BlockSpec((spec.num_kv_heads, share, LANES), lambda i, *_: (0, 0, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    queries = [rows, tiles] if spec.num_tiles else [rows]
    dtype, most_rows = jnp.dtype(spec.dtype), max(share, spec.share * spec.tile_tokens if spec.num_tiles else 0)
    scratch = [
        pltpu.VMEM((2, tiling.pages_per_block, *spec.page_shape), dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((spec.num_kv_heads, most_rows, LANES), jnp.float32),
        pltpu.VMEM((spec.num_kv_heads, most_rows, LANES), jnp.float32),
        pltpu.VMEM((spec.num_kv_heads, most_rows, lanes), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
    ]
    if spec.writes:
        chunk = (tiling.writes_at_once, spec.num_kv_heads, spec.parts)
        scratch += [
            pltpu.VMEM((*chunk, spec.chunk, lanes), dtype),
            pltpu.VMEM((*chunk, 2 * spec.chunk, lanes), dtype),
            pltpu.SemaphoreType.DMA((3,)),
        ]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(spec.row_steps + spec.num_tiles,),
        in_specs=[*queries, *([whole] if spec.sinks else []), *([in_hbm] if spec.writes else []), in_hbm],
        out_specs=[*queries, in_hbm],
        scratch_shapes=scratch,
    )
    outputs = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (*inputs[: len(queries)], inputs[-1])]
    return pl.pallas_call(
        partial(_kernel, spec, tiling),
        out_shape=outputs,
        grid_spec=grid_spec,
        input_output_aliases={len(scalars) + len(inputs) - 1: len(outputs) - 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=tiling.vmem_limit, has_side_effects=False
        ),
        interpret=interpret,
        name="anychip_ragged_paged_attention",
    )(*scalars, *inputs)


def _kernel(spec: AttentionSpec, tiling: Tiling, *refs: Any) -> None:
    given = iter(refs)
    visits = Visits(*(next(given) for _ in range(_NUM_VISIT_ARRAYS)))
    tables = next(given)
    writes = Writes(*(next(given) for _ in range(4))) if spec.writes else None
    row_queries = next(given)
    tile_queries = next(given) if spec.num_tiles else None
    sinks = next(given) if spec.sinks else None
    new = next(given) if spec.writes else None
    next(given)  # the pages as they came; the output is the same memory
    row_out = next(given)
    tile_out = next(given) if spec.num_tiles else None
    pages, buffer, sems, maxima, sums, weighted, slot = (next(given) for _ in range(7))
    step = pl.program_id(0)
    reader = PageReader(spec, tiling, visits, tables, pages, buffer, sems)
    work = Step(spec, tiling, visits, reader, Softmax(spec, maxima, sums, weighted), sinks, slot)

    @pl.when(step == 0)
    def _() -> None:
        if writes is not None:
            write_keys(spec, writes, new, pages, *given)
        work.begin()

    @pl.when(step < spec.row_steps)
    def _() -> None:
        work.rows(step, row_queries, row_out)

    if spec.num_tiles:

        @pl.when(step >= spec.row_steps)
        def _() -> None:
            work.tile(step, tile_queries, tile_out)
