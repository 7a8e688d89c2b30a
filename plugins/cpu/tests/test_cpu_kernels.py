"""The CPU plugin's kernels against the reference, on caches that are poisoned wherever nothing was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.ops.reference import REFERENCE, ReferenceAttention, ReferenceMoE
from anychip.ops.table import resolve_ops
from anychip.plugin_api import (
    AttentionLayer,
    AttentionSpec,
    BatchView,
    EngineConfig,
    MoESpec,
    Placement,
    PlatformContext,
    ProbeResult,
    Routing,
    ShapeKey,
    Unsupported,
)
from anychip_cpu import MANIFEST, CpuOptions
from anychip_cpu.attention import SdpaPagedAttention
from anychip_cpu.moe import GroupedMoE
from anychip_cpu.platform import CpuPlatform
from anychip_cpu.probe import available_cores, probe

BLOCK = 16
OPS = resolve_ops("cpu", {}).ops


def platform() -> CpuPlatform:
    return CpuPlatform(
        PlatformContext(
            manifest=MANIFEST, device_indexes=(0,), options=CpuOptions(), probe=ProbeResult(), reference=REFERENCE
        )
    )


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


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 15, 16, 17, 40, 63]), st.sampled_from([0, 1, 1, 1, 2, 16, 33])),
        min_size=1,
        max_size=5,
    ).filter(lambda rows: any(now for _, now in rows) and all(before + now for before, now in rows)),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (8, 1)]),
    dim=st.sampled_from([8, 20, 64]),
    window=st.sampled_from([None, 1, 7, 16, 33]),
    softcap=st.sampled_from([None, 5.0]),
    sinks=st.booleans(),
    kv_dtype=st.sampled_from(["float32", "float8_e4m3fn", "int8"]),
    scales=st.sampled_from(["none", "one", "by head"]),
    seed=st.integers(0, 2**16),
)
def test_attention_equals_the_reference_on_ragged_batches(
    rows, heads, dim, window, softcap, sinks, kv_dtype, scales, seed
):
    torch.manual_seed(seed)
    spec = AttentionSpec(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=dim,
        dtype="float32",
        kv_dtype=kv_dtype,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    batch, num_blocks = make_batch(rows, np.random.default_rng(seed), window)
    mine, reference = SdpaPagedAttention(spec), ReferenceAttention(spec)
    size = num_blocks * mine.kv_layout().page_bytes(BLOCK)
    cache = mine.make_cache(torch.empty(size, dtype=torch.uint8), num_blocks, BLOCK)
    cache.fill_(torch.nan if kv_dtype == "float32" else 0xFF)  # 0xFF is NaN in float8_e4m3fn
    layer = AttentionLayer(index=0, scale=dim**-0.5, ops=OPS)
    if scales != "none" or kv_dtype == "int8":
        layer.k_scale, layer.v_scale = (torch.rand(heads[1] if scales == "by head" else 1) * 0.05 + 0.01 for _ in "kv")
    if sinks:
        layer.sinks = torch.randn(heads[0]) * 2
    for row, (before, _) in enumerate(rows):
        for position in range(before):
            block = int(batch.block_table[row, position // BLOCK])
            if block:
                cache[block, 0, position % BLOCK] = mine.encode(torch.randn(heads[1], dim), layer.k_scale)
                cache[block, 1, position % BLOCK] = mine.encode(torch.randn(heads[1], dim), layer.v_scale)
    q = torch.randn(batch.num_tokens, heads[0], dim)
    k, v = torch.randn(2, batch.num_tokens, heads[1], dim).unbind()
    key = ShapeKey(num_tokens=batch.num_tokens, num_reqs=len(rows), max_query_len=batch.max_query_len, num_pages=0)
    theirs = cache.clone()
    expected, theirs = reference.forward(q, k, v, theirs, reference.plan(batch, key, group=0), layer)
    actual, cache = mine.forward(q, k, v, cache, mine.plan(batch, key, group=0), layer)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    assert cache.nan_to_num().equal(theirs.nan_to_num()), "the caches hold the same bytes"


def test_a_token_without_a_slot_is_not_written():
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8, dtype="float32", kv_dtype="float32")
    batch, num_blocks = make_batch([(0, 3)], np.random.default_rng(0), None)
    batch.slot_mapping[1] = -1
    mine = SdpaPagedAttention(spec)
    size = num_blocks * mine.kv_layout().page_bytes(BLOCK)
    cache = mine.make_cache(torch.zeros(size, dtype=torch.uint8), num_blocks, BLOCK)
    key = ShapeKey(num_tokens=3, num_reqs=1, max_query_len=3, num_pages=1)
    layer = AttentionLayer(index=0, scale=1.0, ops=OPS)
    ones = torch.ones(3, 1, 8)
    mine.write_kv(ones, ones, cache, mine.plan(batch, key, group=0), layer)
    assert int(cache.sum()) == 2 * 2 * 8


def test_what_is_not_declared_is_refused_with_every_reason():
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8, dtype="float16", kv_dtype="float8_e5m2")
    with pytest.raises(Unsupported) as refused:
        platform().attention(spec)
    assert len(refused.value.reasons) == 2


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 20),
    experts=st.sampled_from([2, 5, 8]),
    top_k=st.integers(1, 2),
    renormalize=st.booleans(),
    hide=st.booleans(),
    seed=st.integers(0, 999),
)
def test_grouped_experts_equal_the_reference(tokens, experts, top_k, renormalize, hide, seed):
    torch.manual_seed(seed)
    spec = MoESpec(
        num_experts=experts,
        top_k=top_k,
        hidden_size=12,
        intermediate_size=10,
        dtype="float32",
        renormalize=renormalize,
    )
    mine, reference = GroupedMoE(spec, platform()), ReferenceMoE(spec, platform())
    packed = reference.begin()
    for expert in range(experts):
        packed.gate_up[expert].normal_()
        packed.down[expert].normal_()
    expert_map = torch.arange(experts)
    if hide:
        expert_map[0] = -1
    x = torch.randn(tokens, 12)
    routing = mine.route(torch.randn(tokens, experts))
    torch.testing.assert_close(
        mine.experts(x, routing, packed, expert_map=expert_map),
        reference.experts(x, routing, packed, expert_map=expert_map),
        rtol=1e-4,
        atol=1e-4,
    )


def test_routing_is_softmax_then_top_k_renormalised():
    spec = MoESpec(num_experts=3, top_k=2, hidden_size=4, intermediate_size=4, dtype="float32")
    routing = GroupedMoE(spec, platform()).route(torch.tensor([[0.0, 1.0, 2.0]]))
    assert isinstance(routing, Routing)
    assert routing.expert_ids.tolist() == [[2, 1]]
    assert routing.weights.sum().item() == pytest.approx(1.0)
    assert (routing.weights[0, 0] / routing.weights[0, 1]).item() == pytest.approx(np.e, rel=1e-5)


def test_the_host_is_always_found():
    result = probe()
    assert result.devices[0].total_memory
    assert not result.reason


def test_workers_share_the_cores():
    def threads(world_size: int, **options: str) -> str | None:
        placement = Placement(rank=0, world_size=world_size, device_indexes=(0,))
        return MANIFEST.worker_env(EngineConfig(device_options=options), placement).get("OMP_NUM_THREADS")

    assert threads(1) is None
    assert threads(2) == str(max(1, available_cores() // 2))
    assert threads(2, threads="7") is None
