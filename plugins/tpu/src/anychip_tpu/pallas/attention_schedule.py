"""Turns a step's arrays into lists of integers that the attention kernel follows. Plain jax.numpy, a few hundred words.

A visit is a row of the batch together with a grid step that holds tokens of it. Grid steps for decode rows come first,
eight rows in each; then tiles of consecutive tokens. Rows that lead the batch with one token each are decode rows. All
others (prefill, and chunks behind a cached prefix) are tiles'. So one compiled kernel serves every mixture.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from anychip_tpu.pallas.attention_spec import AttentionSpec

Array = jax.Array


class Visits(NamedTuple):
    row: Array  # [max_visits]
    first_block: Array  # [max_visits], of keys
    end_block: Array  # [max_visits]
    num_pages: Array  # [max_visits], of the row, up to the last key that the visit's tokens see
    of_step: Array  # [grid steps + 1], each step's first visit
    starts: Array  # [num_rows + 1], each row's first token
    shifts: Array  # [num_rows], position of a token less its index
    num_decode: Array  # [1]


class Writes(NamedTuple):
    """Runs of consecutive tokens whose slots are consecutive and lie in one chunk of a page."""

    token: Array  # [num_tokens], each run's first
    slot: Array  # [num_tokens]
    count: Array  # [num_tokens]
    info: Array  # [2], number of runs; how many may be under way at once, 1 if two runs share a chunk


def plan_visits(spec: AttentionSpec, starts: Array, lengths: Array, keys_per_block: int) -> Visits:
    """starts [num_rows + 1] int32, lengths [num_rows] int32: keys of each row, this step's included."""
    starts, lengths = starts.astype(jnp.int32), lengths.astype(jnp.int32)
    counts = starts[1:] - starts[:-1]
    num_decode = jnp.sum(jnp.cumprod((counts == 1).astype(jnp.int32)))
    rows = jnp.arange(spec.num_rows, dtype=jnp.int32)
    decode = rows < num_decode
    if spec.num_tiles:
        first_tile = starts[:-1] // spec.tile_tokens
        tiles = jnp.where(counts > 0, (starts[1:] - 1) // spec.tile_tokens - first_tile + 1, 0)
        visits_of_row = jnp.where(decode, 1, tiles)
    else:
        first_tile = jnp.zeros_like(rows)
        visits_of_row = decode.astype(jnp.int32)
    ends = jnp.cumsum(visits_of_row)
    visit = jnp.arange(spec.max_visits, dtype=jnp.int32)
    row = jnp.minimum(_count_up_to(ends, visit), spec.num_rows - 1)
    tile = first_tile[row] + visit - (ends - visits_of_row)[row]
    step = jnp.where(decode[row], row // spec.rows_per_step, spec.row_steps + tile)
    step = jnp.where(visit < ends[-1], step, spec.row_steps + spec.num_tiles)

    tile_start = jnp.where(decode[row], starts[row], tile * spec.tile_tokens)
    tile_end = jnp.where(decode[row], starts[row] + 1, tile_start + spec.tile_tokens)
    shifts = lengths - starts[1:]
    first_position = jnp.maximum(tile_start, starts[row]) + shifts[row]
    last_position = jnp.maximum(jnp.minimum(tile_end, starts[row + 1]) - 1 + shifts[row], 0)
    first_key = jnp.zeros_like(first_position)
    if spec.window is not None:
        first_key = jnp.maximum(first_position - spec.window + 1, 0)
    steps = jnp.arange(spec.row_steps + spec.num_tiles + 1, dtype=jnp.int32)
    return Visits(
        row=row,
        first_block=first_key // keys_per_block,
        end_block=last_position // keys_per_block + 1,
        num_pages=jnp.minimum(last_position // spec.page_size + 1, spec.pages_per_row),
        of_step=_count_up_to(step, steps - 1),
        starts=starts,
        shifts=shifts,
        num_decode=num_decode.reshape(1).astype(jnp.int32),
    )


def plan_writes(spec: AttentionSpec, slots: Array, writes_at_once: int) -> Writes:
    """slots [num_tokens]: page * page_size + place in the page; -1 for a token that is not written."""
    slots = slots.astype(jnp.int32)
    token = jnp.arange(spec.num_tokens, dtype=jnp.int32)
    before = jnp.concatenate([jnp.full(1, -2, jnp.int32), slots[:-1]])
    valid = slots >= 0
    begins = valid & ((slots != before + 1) | (slots % spec.chunk == 0))
    # All pairs are compared: the compiler takes seconds for a sort, and less than a microsecond of the step's time.
    run_of_token = jnp.cumsum(begins.astype(jnp.int32)) - 1
    num_runs = run_of_token[-1] + 1
    first = jnp.minimum(_count_up_to(run_of_token, token - 1), spec.num_tokens - 1)  # each run's first token
    count = jnp.sum((run_of_token == token[:, None]) & valid, axis=1, dtype=jnp.int32)
    slot = slots[first]
    chunk = jnp.where(token < num_runs, slot // spec.chunk, -1 - token)
    shared = jnp.sum(chunk == chunk[:, None], dtype=jnp.int32) > spec.num_tokens
    at_once = jnp.where(shared, 1, writes_at_once)
    return Writes(first, slot, count, jnp.stack([num_runs, at_once]).astype(jnp.int32))


def _count_up_to(ordered: Array, values: Array) -> Array:
    """How many of `ordered` are at most each value."""
    return jnp.searchsorted(ordered, values, side="right", method="compare_all").astype(jnp.int32)
