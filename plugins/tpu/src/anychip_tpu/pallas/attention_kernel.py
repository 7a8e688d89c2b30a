"""The body of the ragged paged attention kernel: what one grid step does. attention.py calls it.

Follows the idea of paged attention over ragged batches with an online softmax (arXiv 2309.06180, 2205.14135,
2604.15464). Pages come from HBM by transfers of the kernel's own, into one of two buffers: while one block of keys is
used, the next one is on its way, also the first of the next row or tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from anychip_tpu.pallas.attention_schedule import Visits, Writes
from anychip_tpu.pallas.attention_spec import AttentionSpec, Tiling
from anychip_tpu.pallas.budget import LANES

Ref = Any
HIDDEN = -1e30  # the score of a key that a token does not see; finite, so that no difference of two is NaN


class PageReader:
    """Brings blocks of keys of visits into the two buffers."""

    def __init__(
        self, spec: AttentionSpec, tiling: Tiling, visits: Visits, tables: Ref, pages: Ref, buffer: Ref, sems: Ref
    ):
        self.spec, self.tiling, self.visits = spec, tiling, visits
        self.tables, self.pages, self.buffer, self.sems = tables, pages, buffer, sems

    def _each(self, visit: Any, block: Any, slot: Any, act: Callable[[Any], None]) -> None:
        first = block * self.tiling.pages_per_block
        count = jnp.minimum(self.visits.num_pages[visit] - first, self.tiling.pages_per_block)
        row = self.visits.row[visit] * self.spec.pages_per_row

        def one(index: Any, _: None) -> None:
            page = self.tables[row + first + index]
            act(pltpu.make_async_copy(self.pages.at[page], self.buffer.at[slot, index], self.sems.at[slot]))

        lax.fori_loop(0, count, one, None)

    def start(self, visit: Any, block: Any, slot: Any) -> None:
        self._each(visit, block, slot, lambda copy: copy.start())

    def wait(self, visit: Any, block: Any, slot: Any) -> None:
        self._each(visit, block, slot, lambda copy: copy.wait())


class Softmax:
    """Running maximum, sum and weighted values of each KV head's queries: [num_kv_heads, rows, ...] float32."""

    def __init__(self, spec: AttentionSpec, maxima: Ref, sums: Ref, weighted: Ref):
        self.spec, self.maxima, self.sums, self.weighted = spec, maxima, sums, weighted

    def begin(self, num_rows: int, sinks_of: Callable[[int], Any] | None) -> None:
        """A sink is a key whose value is zero: it starts the sum."""
        for head in range(self.spec.num_kv_heads):
            sinks = None if sinks_of is None else sinks_of(head)
            shape = (num_rows, LANES)
            self.maxima[head, :num_rows] = jnp.full(shape, HIDDEN, jnp.float32) if sinks is None else sinks
            self.sums[head, :num_rows] = jnp.full(shape, 0.0 if sinks is None else 1.0, jnp.float32)
        self.weighted[:, :num_rows] = jnp.zeros((self.spec.num_kv_heads, num_rows, self.spec.lanes), jnp.float32)

    def add(self, head: int, num_rows: int, queries: Any, keys: Any, values: Any, visible: Any) -> None:
        """queries [rows, lanes], keys and values [keys, lanes], visible [rows, keys]."""
        precision = lax.Precision.HIGHEST if self.spec.dtype == "float32" else None
        over_lanes = (((1,), (1,)), ((), ()))
        scores = lax.dot_general(
            queries, keys, over_lanes, precision=precision, preferred_element_type=jnp.float32
        ) * self.spec.scale  # fmt: skip
        if self.spec.softcap is not None:
            scores = self.spec.softcap * jnp.tanh(scores * (1 / self.spec.softcap))
        scores = jnp.where(visible, scores, HIDDEN)
        before = self.maxima[head, :num_rows]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - now[:, :1])
        fade = jnp.exp(before - now)
        self.maxima[head, :num_rows] = now
        self.sums[head, :num_rows] = self.sums[head, :num_rows] * fade + jnp.sum(weights, axis=1, keepdims=True)
        product = lax.dot_general(
            weights.astype(values.dtype), values, (((1,), (0,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        self.weighted[head, :num_rows] = self.weighted[head, :num_rows] * fade[:, :1] + product

    def result(self, head: int, num_rows: int) -> Any:
        return self.weighted[head, :num_rows] / self.sums[head, :num_rows][:, :1]


class Step:
    """One grid step's visits."""

    def __init__(self, spec: AttentionSpec, tiling: Tiling, visits: Visits, reader: PageReader, softmax: Softmax,
                 sinks: Ref | None, slot: Ref):  # fmt: skip
        self.spec, self.tiling, self.visits, self.reader, self.softmax = spec, tiling, visits, reader, softmax
        self.sinks, self.slot = sinks, slot
        self.num_keys = tiling.pages_per_block * spec.page_size
        self.last_visit = visits.of_step[spec.row_steps + spec.num_tiles]

    def begin(self) -> None:
        """Before the first step's visits. Parts of a buffer that no page fills are multiplied by zero: they must be
        finite."""
        self.reader.buffer[...] = jnp.zeros_like(self.reader.buffer)
        self.slot[0] = 0

        @pl.when(self.last_visit > 0)
        def _() -> None:
            self.reader.start(0, self.visits.first_block[0], 0)

    def rows(self, step: Any, queries: Ref, out: Ref) -> None:
        """queries, out [rows_per_step, num_kv_heads, padded share, lanes]."""
        out[...] = jnp.zeros_like(out)
        count = self.spec.padded_share

        def visit_row(visit: Any, _: None) -> None:
            row = self.visits.row[visit]
            place = row - step * self.spec.rows_per_step
            last = self.visits.starts[row] + self.visits.shifts[row]

            def visible(first_key: Any) -> Any:
                return self._seen(first_key + lax.broadcasted_iota(jnp.int32, (count, self.num_keys), 1), last)

            self.softmax.begin(count, None if self.sinks is None else lambda head: self.sinks[head])
            self._attend(visit, count, lambda head: queries[place, head], visible)
            for head in range(self.spec.num_kv_heads):
                out[place, head] = self.softmax.result(head, count).astype(out.dtype)

        lax.fori_loop(self.visits.of_step[step], self.visits.of_step[step + 1], visit_row, None)

    def tile(self, step: Any, queries: Ref, out: Ref) -> None:
        """queries, out [num_kv_heads, share, tile_tokens, lanes]."""
        spec = self.spec
        out[...] = jnp.zeros_like(out)
        share, tokens = spec.share, spec.tile_tokens
        count, first_token = share * tokens, (step - spec.row_steps) * tokens

        def sinks_of(head: int) -> Any:
            of_heads = self.sinks[head, :share]  # [share, LANES]
            return jnp.broadcast_to(of_heads[:, None], (share, tokens, LANES)).reshape(count, LANES)

        def visit_tile(visit: Any, _: None) -> None:
            row = self.visits.row[visit]
            start, end, shift = self.visits.starts[row], self.visits.starts[row + 1], self.visits.shifts[row]

            def visible(first_key: Any) -> Any:
                shape = (share, tokens, self.num_keys)
                token = first_token + lax.broadcasted_iota(jnp.int32, shape, 1).reshape(count, self.num_keys)
                key = first_key + lax.broadcasted_iota(jnp.int32, (count, self.num_keys), 1)
                # Tokens of other rows get something finite, which is not taken over.
                return self._seen(key, token + shift)

            self.softmax.begin(count, None if self.sinks is None else sinks_of)
            self._attend(visit, count, lambda head: queries[head].reshape(count, spec.lanes), visible)
            token = first_token + lax.broadcasted_iota(jnp.int32, (share, tokens, spec.lanes), 1)
            inside = (token >= start) & (token < end)
            for head in range(spec.num_kv_heads):
                result = self.softmax.result(head, count).reshape(share, tokens, spec.lanes)
                out[head] = jnp.where(inside, result, out[head].astype(jnp.float32)).astype(out.dtype)

        lax.fori_loop(self.visits.of_step[step], self.visits.of_step[step + 1], visit_tile, None)

    def _seen(self, key: Any, position: Any) -> Any:
        seen = key <= position
        return seen if self.spec.window is None else seen & (key > position - self.spec.window)

    def _attend(self, visit: Any, count: int, queries_of: Callable[[int], Any], visible: Callable[[Any], Any]) -> None:
        spec, reader = self.spec, self.reader
        end = self.visits.end_block[visit]

        def block_of_keys(block: Any, _: None) -> None:
            slot = self.slot[0]
            more = block + 1 < end
            next_visit = jnp.where(more, visit, visit + 1)

            @pl.when(next_visit < self.last_visit)
            def _() -> None:
                # Read only where there is a next visit: the arrays end with the last.
                next_block = jnp.where(more, block + 1, self.visits.first_block[next_visit])
                reader.start(next_visit, next_block, 1 - slot)

            reader.wait(visit, block, slot)
            seen = visible(block * self.num_keys)
            for head in range(spec.num_kv_heads):
                keys = reader.buffer[slot, :, head, 0].reshape(self.num_keys, spec.lanes)
                values = reader.buffer[slot, :, head, spec.parts - 1].reshape(self.num_keys, spec.lanes)
                self.softmax.add(head, count, queries_of(head), keys, values, seen)
            self.slot[0] = 1 - slot

        lax.fori_loop(self.visits.first_block[visit], end, block_of_keys, None)


def write_keys(spec: AttentionSpec, writes: Writes, new: Ref, pages: Ref, old: Ref, fresh: Ref, sems: Ref) -> None:
    """Puts this step's keys and values into their pages, a chunk at a time: reads it, replaces rows, writes it back.

    new [num_kv_heads, parts, tokens + 2 chunks, lanes]; old [n, num_kv_heads, parts, chunk, lanes]; fresh two chunks.
    """
    # lax.div and lax.rem: no number here is negative, and what // and % do about signs asks for a TPU at hand.
    chunk, size = spec.chunk, spec.page_size
    num_runs, at_once = writes.info[0], writes.info[1]

    def place(run: Any) -> Any:
        slot = writes.slot[run]
        first = pl.multiple_of(lax.div(lax.rem(slot, size), chunk) * chunk, chunk)
        return pages.at[lax.div(slot, size), :, :, pl.ds(first, chunk), :]

    def source(run: Any) -> Any:
        first = pl.multiple_of(lax.div(writes.token[run], chunk) * chunk, chunk)
        return new.at[:, :, pl.ds(first, 2 * chunk), :]

    def group(number: Any, _: None) -> None:
        first = number * at_once
        count = jnp.minimum(at_once, num_runs - first)

        def each(act: Callable[[Any, Any], None]) -> None:
            lax.fori_loop(0, count, lambda index, _: act(first + index, index), None)

        def read(run: Any, index: Any, act: str) -> None:
            getattr(pltpu.make_async_copy(place(run), old.at[index], sems.at[0]), act)()
            getattr(pltpu.make_async_copy(source(run), fresh.at[index], sems.at[1]), act)()

        def merge(run: Any, index: Any) -> None:
            begin = lax.rem(writes.slot[run], chunk)
            turn = lax.rem(begin - lax.rem(writes.token[run], chunk) + 2 * chunk, 2 * chunk)
            row = lax.broadcasted_iota(jnp.int32, (chunk, spec.lanes), 0)
            replaced = (row >= begin) & (row < begin + writes.count[run])
            for head in range(spec.num_kv_heads):
                for part in range(spec.parts):
                    # Rows turn only in 32 bits; widening and rounding back changes no value.
                    turned = pltpu.roll(fresh[index, head, part].astype(jnp.float32), turn, 0)[:chunk]
                    kept = old[index, head, part].astype(jnp.float32)
                    old[index, head, part] = jnp.where(replaced, turned, kept).astype(old.dtype)

        def write(run: Any, index: Any, act: str) -> None:
            getattr(pltpu.make_async_copy(old.at[index], place(run), sems.at[2]), act)()

        each(lambda run, index: read(run, index, "start"))
        each(lambda run, index: read(run, index, "wait"))
        each(merge)
        each(lambda run, index: write(run, index, "start"))
        each(lambda run, index: write(run, index, "wait"))

    lax.fori_loop(0, lax.div(num_runs + at_once - 1, at_once), group, None)
