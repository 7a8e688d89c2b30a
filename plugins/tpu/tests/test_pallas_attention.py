"""Ragged paged attention in the interpreter of Pallas against plain numpy: a simulation, no TPU ran it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="the Pallas kernels need jax: pip install 'anychip-tpu[ahead]'")

from anychip.plugin_api import Unsupported  # noqa: E402
from anychip_tpu.pallas.attention import ragged_paged_attention  # noqa: E402
from anychip_tpu.pallas.attention_reference import reference_attention, split  # noqa: E402
from anychip_tpu.pallas.attention_spec import AttentionSpec, choose_tiling  # noqa: E402
from anychip_tpu.pallas.generations import generation  # noqa: E402
from anychip_tpu.pallas.interpreter import INTERPRETED, compiled, race_found  # noqa: E402

V5E = generation("v5e")
SPEC = AttentionSpec(
    num_tokens=40, num_rows=4, pages_per_row=6, num_heads=4, num_kv_heads=2, head_dim=128, page_size=16,
    dtype="float32", scale=0.1,
)  # fmt: skip
MIXED = [(1, 33), (1, 7), (21, 40), (14, 14)]  # tokens of this step, keys with them: decode, a chunk, a prompt


class Batch:
    """Rows over shuffled pages. Pages hold large values wherever no row's key is."""

    def __init__(self, spec: AttentionSpec, rows: list[tuple[int, int]]) -> None:
        self.spec = spec
        self.random = np.random.default_rng(0)
        padding = spec.num_rows - len(rows)
        self.starts = np.cumsum([0, *(count for count, _ in rows), *[0] * padding]).astype(np.int32)
        self.lengths = np.array([*(length for _, length in rows), *[0] * padding], np.int32)
        num_pages = spec.num_rows * spec.pages_per_row + 2
        shuffled = self.random.permutation(num_pages)[: spec.num_rows * spec.pages_per_row]
        self.tables = shuffled.reshape(spec.num_rows, -1).astype(np.int32)
        self.slots = np.full(spec.num_tokens, -1, np.int32)
        for row, (count, length) in enumerate(rows):
            for token in range(count):
                page, place = divmod(length - count + token, spec.page_size)
                self.slots[self.starts[row] + token] = self.tables[row, page] * spec.page_size + place
        self.q = self._drawn(spec.num_tokens, spec.num_heads, spec.head_dim)
        self.k = self._drawn(spec.num_tokens, spec.num_kv_heads, spec.head_dim)
        self.v = self._drawn(spec.num_tokens, spec.num_kv_heads, spec.head_dim)
        self.pages = self._drawn(num_pages, *spec.page_shape) * 10
        self.sinks = self._drawn(spec.num_heads) if spec.sinks else None

    def _drawn(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, dtype=np.float32).astype(jax.numpy.dtype(self.spec.dtype))

    def arguments(self) -> tuple[np.ndarray | None, ...]:
        new = (self.k, self.v, self.slots) if self.spec.writes else (None, None, None)
        return self.q, *new[:2], self.pages, self.tables, self.starts, self.lengths, new[2], self.sinks


@cache
def kernel(spec: AttentionSpec):
    blank = Batch(spec, []).arguments()
    return compiled(partial(ragged_paged_attention, spec=spec, chip=V5E, interpret=INTERPRETED), *blank)


def run(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    out, pages = kernel(batch.spec)(*batch.arguments())
    assert not race_found(out, pages)
    return np.asarray(out, np.float64), np.asarray(pages)


def contents(spec: AttentionSpec, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [num_kv_heads, pages, page_size, head_dim]."""
    return split(spec, pages.transpose(1, 2, 0, 3, 4))


def compare(batch: Batch) -> None:
    """Outputs to rounding; what the pages hold to the bit."""
    out, pages = run(batch)
    expected, expected_pages = reference_attention(batch.spec, *batch.arguments())
    # Weights are rounded to the dtype before they multiply values of up to about 40.
    bound = 40 * {"float32": 2e-6, "bfloat16": 2**-9}[batch.spec.dtype]
    np.testing.assert_allclose(out, expected, atol=bound, rtol=bound)
    for got, wanted in zip(contents(batch.spec, pages), contents(batch.spec, expected_pages), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(MIXED, id="mixed"),
        pytest.param([(20, 20), (1, 50), (3, 9)], id="a decode row behind a prompt"),
        pytest.param([(2, 2), (3, 19), (2, 30), (4, 4)], id="rows that share a tile"),
        pytest.param([(1, 5), (1, 90), (1, 16), (1, 17)], id="decode rows in a large bucket"),
        pytest.param([], id="no rows"),
    ],
)
def test_kernel_equals_the_plain_form(rows: list[tuple[int, int]]) -> None:
    compare(Batch(SPEC, rows))


CASES = {
    "decode alone, in bfloat16": (
        [(1, 1), (1, 95), (1, 17)],
        {"num_tokens": 4, "decode_only": True, "dtype": "bfloat16"},
    ),
    "heads of 64 in one row of lanes, window, sinks, softcap": (
        MIXED,
        {"head_dim": 64, "dtype": "bfloat16", "window": 7, "sinks": True, "softcap": 5.0},
    ),
    "pages of 128, one KV head for seven": (
        [(1, 200), (30, 130)],
        {"page_size": 128, "pages_per_row": 2, "num_heads": 7, "num_kv_heads": 1, "dtype": "bfloat16"},
    ),
    "another layer's keys, heads of 80, sinks": (MIXED, {"writes": False, "head_dim": 80, "sinks": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_plain_form_with(name: str) -> None:
    rows, changes = CASES[name]
    compare(Batch(replace(SPEC, **changes), rows))


@pytest.mark.parametrize("window", [None, 40])
def test_keys_in_more_than_one_block(window: int | None) -> None:
    """512 keys are in a block. The first row's window has one key of its first block, the other's none."""
    spec = replace(SPEC, num_tokens=4, num_rows=2, pages_per_row=38, num_heads=1, num_kv_heads=1, window=window)
    compare(Batch(spec, [(1, 551), (3, 600)]))


def test_tokens_without_a_slot_are_not_written() -> None:
    batch = Batch(SPEC, MIXED)
    batch.slots[[0, 5, 30]] = -1
    compare(batch)


def test_slots_in_any_order_keep_every_write() -> None:
    """Two runs in one chunk of a page must not undo each other."""
    batch = Batch(SPEC, MIXED)
    batch.slots[2:23] = batch.slots[2:23][::-1]
    compare(batch)


def test_what_a_table_names_behind_its_row_is_not_read() -> None:
    batch = Batch(SPEC, MIXED)
    out, _ = run(batch)
    used = -(-batch.lengths // SPEC.page_size)
    for row, count in enumerate(used):
        batch.tables[row, count:] = 10**6
    again, _ = run(batch)
    np.testing.assert_array_equal(out, again)


def test_one_rows_nan_stays_in_it() -> None:
    batch = Batch(SPEC, MIXED)
    clean, _ = run(batch)
    batch.v[5] = np.nan  # of the third row
    out, pages = run(batch)
    assert np.isnan(out[5:23]).any()
    np.testing.assert_array_equal(np.delete(out, range(2, 23), 0), np.delete(clean, range(2, 23), 0))
    rows = contents(SPEC, pages)[1].reshape(-1, SPEC.head_dim)
    assert np.isnan(rows).any(axis=1).sum() == SPEC.num_kv_heads


def test_too_little_vmem_is_refused_with_numbers() -> None:
    large = replace(SPEC, num_heads=512, num_kv_heads=512, page_size=128, dtype="bfloat16")
    with pytest.raises(Unsupported, match=r"needs [\d.]+ MiB of VMEM, a core of v4 has 16 MiB") as refused:
        choose_tiling(large, generation("v4"))
    assert "largest buffer is" in str(refused.value)


def test_blocks_shrink_before_a_kernel_is_refused() -> None:
    wide = replace(SPEC, num_heads=32, num_kv_heads=32, page_size=16, pages_per_row=64, dtype="bfloat16")
    assert choose_tiling(wide, generation("v4")).pages_per_block < choose_tiling(wide, V5E).pages_per_block


def test_too_little_smem_is_refused_with_numbers() -> None:
    long = replace(SPEC, num_rows=256, pages_per_row=8192)
    with pytest.raises(Unsupported, match=r"need 8\d\d\d KiB of SMEM, a core of v5e has 1024 KiB.*larger pages"):
        choose_tiling(long, V5E)


def test_every_reason_against_a_spec_is_named() -> None:
    odd = replace(SPEC, num_heads=5, page_size=20, dtype="bfloat16")
    with pytest.raises(Unsupported, match="5 heads are no multiple of 2 KV heads; pages of 20 tokens"):
        choose_tiling(odd, V5E)
