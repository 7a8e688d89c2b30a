"""Paged attention of every variant that this processor runs, plain PyTorch's among them, against the reference: caches
that are poisoned wherever nothing was written, odd shapes, one thread and two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.ops.reference import ReferenceAttention
from anychip.ops.table import resolve_ops
from anychip.plugin_api import AttentionLayer, AttentionSpec, BatchView, QKNorm, Rope, ShapeKey, Unsupported
from anychip_cpu import native
from anychip_cpu.probe import available_cores

BLOCK = 16
OPS = resolve_ops("cpu", {}).ops
COMPILED = native.usable()
VARIANTS = [*COMPILED, native.REFERENCE]


def make_batch(rows: list[tuple[int, int]], rng: np.random.Generator, window: int | None):
    """`rows` are (computed before, computed now). Blocks are scattered; those that a window has passed are null."""
    total = sum(now for _, now in rows)
    pages = max(-(-(before + now) // BLOCK) for before, now in rows)
    num_blocks = 1 + len(rows) * pages + 2
    ids = rng.permutation(np.arange(1, num_blocks))
    table = np.zeros((len(rows), pages), dtype=np.int32)
    slots, positions, starts = [], [], [0]
    for row, (before, now) in enumerate(rows):
        needed = -(-(before + now) // BLOCK)
        table[row, :needed] = ids[row * pages : row * pages + needed]
        if window is not None:
            table[row, : max(0, before - window + 1) // BLOCK] = 0
        for position in range(before, before + now):
            slots.append(table[row, position // BLOCK] * BLOCK + position % BLOCK)
            positions.append(position)
        starts.append(starts[-1] + now)
    batch = BatchView(
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([before + now for before, now in rows], dtype=torch.int32),
        block_table=torch.from_numpy(table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        num_reqs=len(rows),
        num_tokens=total,
        max_query_len=max(now for _, now in rows),
        block_size=BLOCK,
        host_query_lens=np.diff(starts),
        host_seq_lens=None,
        host_exact=False,
    )
    return batch, num_blocks


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 15, 16, 17, 130, 300]), st.sampled_from([0, 1, 1, 2, 16, 33, 140])),
        min_size=1,
        max_size=4,
    ).filter(lambda rows: any(now for _, now in rows) and all(before + now for before, now in rows)),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (14, 2), (8, 1)]),
    dim=st.sampled_from([8, 17, 20, 64, 80]),
    window=st.sampled_from([None, 1, 7, 16, 33, 131]),
    softcap=st.sampled_from([None, 5.0]),
    extra=st.sampled_from(["", "sinks", "alibi"]),
    kv_dtype=st.sampled_from(["float32", "float8_e4m3fn", "int8"]),
    rope=st.sampled_from(["", "halves", "neighbours"]),
    isa=st.sampled_from(VARIANTS),
    threads=st.sampled_from([1, min(2, available_cores())]),
    seed=st.integers(0, 2**16),
)
def test_attention_equals_the_reference_on_ragged_batches(
    open_cpu, rows, heads, dim, window, softcap, extra, kv_dtype, rope, isa, threads, seed
):
    """A step that fills the cache, and one that goes on from it, wherever its blocks lie."""
    torch.manual_seed(seed)
    spec = AttentionSpec(
        num_heads=heads[0], num_kv_heads=heads[1], head_dim=dim, dtype="float32", kv_dtype=kv_dtype, window=window,
        softcap=softcap, sinks=extra == "sinks", alibi=extra == "alibi", lse=isa in COMPILED,
    )  # fmt: skip
    layer = AttentionLayer(index=0, scale=dim**-0.5, ops=OPS)
    if kv_dtype != "float32":
        layer.k_scale, layer.v_scale = (torch.rand(heads[1]) * 0.05 + 0.01 for _ in "kv")
    if extra == "sinks":
        layer.sinks = torch.randn(heads[0]) * 2
    if extra == "alibi":
        layer.alibi_slopes = torch.rand(heads[0])
    turn = norm = None
    if rope:
        angles = torch.rand(512, dim // 4) * 6
        turn = Rope(cos=angles.cos(), sin=angles.sin(), rotary_dim=2 * (dim // 4), interleaved=rope == "neighbours")
        norm = QKNorm(q_weight=torch.rand(dim) + 0.5, k_weight=torch.rand(dim) + 0.5, eps=1e-6)
    mine, reference = open_cpu(isa, threads).attention(spec), ReferenceAttention(spec)
    batch, num_blocks = make_batch(rows, np.random.default_rng(seed), window)
    caches = []
    for backend in (mine, reference):
        raw = torch.full((num_blocks * backend.kv_layout().page_bytes(BLOCK),), 0xFF, dtype=torch.uint8)  # NaN, or -1
        caches.append(backend.make_cache(raw, num_blocks, BLOCK))
    if any(past for past, _ in rows):
        # The same blocks as the step below: the rows' first tokens, without those that a window has left.
        first, _ = make_batch(rows, np.random.default_rng(seed), window)
        as_past(first, rows)
        q, k, v = tensors(first.num_tokens, spec)
        for index, backend in enumerate((mine, reference)):
            _, caches[index] = backend.forward(
                q, k, v, caches[index], backend.plan(first, key(first), group=0), layer, rope=turn, qk_norm=norm
            )
    q, k, v = tensors(batch.num_tokens, spec)
    results, sums = [], []
    for backend, cache in zip((mine, reference), caches, strict=True):
        plan, turned = backend.plan(batch, key(batch), group=0), {"rope": turn, "qk_norm": norm}
        results.append(backend.forward(q, k, v, cache, plan, layer, **turned)[0])
        if spec.lse:
            part, _ = backend.forward_with_lse(q, None, None, cache, plan, layer, **turned)
            assert part.out.equal(results[-1])
            sums.append(part.lse)
    # A turned key's last bit depends on the order of its sums, and now and then decides how a narrow cache rounds it.
    rounds = kv_dtype != "float32" and bool(rope)
    bound = 2e-3 if rounds else 3e-5
    for found, expected in zip((results[0], *sums[:1]), (results[1], *sums[1:]), strict=True):
        if rounds:  # where a query sees few keys, one that is a step off is seen in its sum
            far = ~torch.isclose(found, expected, rtol=bound, atol=bound)
            assert far.sum() <= max(dim, far.numel() // 100)
            found = torch.where(far & ((found - expected).abs() <= ONE_STEP), expected, found)
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


ONE_STEP = 0.1
"""By how much a key that is rounded to its neighbour moves a score or an output of these tests, at most."""


def key(batch):
    return ShapeKey(
        num_tokens=batch.num_tokens,
        num_reqs=batch.num_reqs,
        num_samples=batch.num_reqs,
        max_query_len=batch.max_query_len,
        num_pages=0,
    )


def tensors(tokens, spec):
    """Queries, keys and values cut from one projection's output, as a model's are."""
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    joined = torch.randn(tokens, heads + 2 * kv_heads, dim)
    return joined.split([heads, kv_heads, kv_heads], dim=1)


def as_past(batch, rows):
    """Turns a batch of (past, now) rows into one that writes their past: positions 0 to past."""
    starts, slots, positions = [0], [], []
    for row, (past, _) in enumerate(rows):
        for position in range(past):
            block = int(batch.block_table[row, position // BLOCK])
            slots.append(block * BLOCK + position % BLOCK if block else -1)
            positions.append(position)
        starts.append(starts[-1] + past)
    batch.query_start = torch.tensor(starts, dtype=torch.int32)
    batch.seq_lens = torch.tensor([past for past, _ in rows], dtype=torch.int32)
    batch.slot_mapping, batch.positions = torch.tensor(slots), torch.tensor(positions, dtype=torch.int32)
    batch.num_tokens = len(slots)


@pytest.mark.parametrize("isa", COMPILED)
def test_one_long_row_is_split_and_comes_out_the_same(open_cpu, isa):
    """A single query over many keys goes to several threads, which add up what they found."""
    spec = AttentionSpec(
        num_heads=4, num_kv_heads=1, head_dim=32, dtype="float32", kv_dtype="float32", sinks=True, lse=True
    )
    torch.manual_seed(0)
    layer = AttentionLayer(index=0, scale=0.2, ops=OPS, sinks=torch.randn(4))
    rows = [(2000, 1)]
    results = []
    for threads in (1, min(2, available_cores())):
        torch.manual_seed(1)
        mine = open_cpu(isa, threads).attention(spec)
        batch, num_blocks = make_batch(rows, np.random.default_rng(0), None)
        first, _ = make_batch(rows, np.random.default_rng(0), None)
        as_past(first, rows)
        cache = mine.make_cache(
            torch.zeros(num_blocks * mine.kv_layout().page_bytes(BLOCK), dtype=torch.uint8), num_blocks, BLOCK
        )
        mine.forward(*tensors(2000, spec), cache, mine.plan(first, key(first), group=0), layer)
        plan = mine.plan(batch, key(batch), group=0)
        results.append(mine.forward_with_lse(*tensors(1, spec), cache, plan, layer)[0])
        # What threads found is added in another order than one thread adds.
        assert results[0].out.equal(results[-1].out) == (threads == 1)
    torch.testing.assert_close(results[0].out, results[-1].out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0].lse, results[-1].lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_blocks_come_back_as_they_were_written(open_cpu, isa, kv_dtype):
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=20, dtype="bfloat16", kv_dtype=kv_dtype)
    mine = open_cpu(isa).attention(spec)
    cache = mine.make_cache(torch.zeros(6 * mine.kv_layout().page_bytes(32), dtype=torch.uint8), 6, 32)
    data = torch.randint(-90, 90, (2, 2, 32, 2, 20)).to(getattr(torch, kv_dtype))
    held = data if kv_dtype == "bfloat16" else data.view(torch.uint8)
    cache = mine.import_blocks(cache, [4, 1], held)
    cache = mine.copy_blocks(cache, [4], [2])
    assert mine.export_blocks(cache, [1, 2]).equal(held[[1, 0]])


@pytest.mark.parametrize("isa", VARIANTS)
def test_a_token_without_a_slot_is_not_written(open_cpu, isa):
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8, dtype="float32", kv_dtype="float32")
    batch, num_blocks = make_batch([(0, 3)], np.random.default_rng(0), None)
    batch.slot_mapping[1] = -1
    mine = open_cpu(isa).attention(spec)
    size = num_blocks * mine.kv_layout().page_bytes(BLOCK)
    cache = mine.make_cache(torch.zeros(size, dtype=torch.uint8), num_blocks, BLOCK)
    layer = AttentionLayer(index=0, scale=1.0, ops=OPS)
    ones = torch.ones(3, 1, 8)
    cache = mine.forward(torch.ones(3, 2, 8), ones, ones, cache, mine.plan(batch, key(batch), group=0), layer)[1]
    assert int(mine.export_blocks(cache, range(num_blocks)).sum()) == 2 * 2 * 8


def test_plain_pytorch_refuses_the_log_sum_exp(open_cpu):
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8, dtype="float32", kv_dtype="float32", lse=True)
    with pytest.raises(Unsupported, match="log-sum-exp"):
        open_cpu(native.REFERENCE).attention(spec)


def test_what_is_not_declared_is_refused_with_every_reason(open_cpu):
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8, dtype="float16", kv_dtype="float8_e5m2")
    with pytest.raises(Unsupported) as refused:
        open_cpu().attention(spec)
    assert len(refused.value.reasons) == 2
