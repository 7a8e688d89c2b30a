"""Latent attention by compiled kernels, of every variant that this processor runs, against the reference: ragged rows,
windows, rotation, choices with ties, padding, poisoned caches, and recorded steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import OPS, as_past, key, make_batch

from anychip.ops.reference import ReferenceLatent, SparseLatent, dense_part
from anychip.plugin_api import IndexInputs, LatentLayer, LatentSpec, Rope
from anychip_cpu import native
from anychip_cpu.latent_kernel import KernelLatent
from anychip_cpu.probe import available_cores
from anychip_cpu.sparse_kernel import KernelSparse

BLOCK = 16
INDEX_HEADS = 11
VARIANTS = native.usable()
pytestmark = pytest.mark.skipif(not VARIANTS, reason="no kernels were compiled")


def spec_of(dtype: str, *, odd: bool = False, window: int | None = None, top_k: int = 0) -> LatentSpec:
    sizes = {"num_heads": 5, "latent_dim": 53, "rope_dim": 6, "nope_dim": 10, "v_dim": 7} if odd else {
        "num_heads": 16, "latent_dim": 128, "rope_dim": 32, "nope_dim": 32, "v_dim": 32
    }  # fmt: skip
    index_dim = (33 if odd else 64) if top_k else 0
    return LatentSpec(**sizes, dtype=dtype, kv_dtype=dtype, window=window, index_dim=index_dim, top_k=top_k)


def layer_of(spec: LatentSpec) -> LatentLayer:
    kind = getattr(torch, spec.dtype)
    up = [torch.randn(spec.num_heads, dim, spec.latent_dim) * dim**-0.5 for dim in (spec.nope_dim, spec.v_dim)]
    return LatentLayer(index=0, scale=0.2, ops=OPS, k_up=up[0].to(kind), v_up=up[1].to(kind))


def rope_of(dim: int, interleaved: bool) -> Rope:
    angles = torch.rand(512, dim // 2) * 6
    return Rope(cos=angles.cos(), sin=angles.sin(), rotary_dim=2 * (dim // 2), interleaved=interleaved)


def given_to(spec: LatentSpec, count: int) -> list[torch.Tensor]:
    """Queries and rows as projections give them: views of something wider."""
    kind = getattr(torch, spec.dtype)
    query = torch.randn(count, spec.num_heads, spec.nope_dim + spec.rope_dim).to(kind)
    row = torch.randn(count, spec.latent_dim + spec.rope_dim).to(kind)
    return [
        *query.split_with_sizes([spec.nope_dim, spec.rope_dim], -1),
        *row.split_with_sizes([spec.latent_dim, spec.rope_dim], -1),
    ]


def index_for(spec: LatentSpec, count: int, *, whole: bool = False) -> IndexInputs:
    """`whole`: numbers whose sums no order of adding changes, so that scores tie."""
    kind = getattr(torch, spec.dtype)
    draw = (lambda *shape: torch.randint(-1, 2, shape).float()) if whole else torch.randn
    return IndexInputs(
        queries=draw(count, INDEX_HEADS, spec.index_dim).to(kind),
        keys=draw(count, spec.index_dim).to(kind),
        weights=draw(count, INDEX_HEADS),
    )


def poisoned(backend, num_blocks: int):
    raw = torch.full((num_blocks * backend.kv_layout().page_bytes(BLOCK),), 0xFF, dtype=torch.uint8)
    return backend.make_cache(raw, num_blocks, BLOCK)


def assert_close(mine: torch.Tensor, wanted: torch.Tensor) -> None:
    limit = 3e-2 if mine.dtype == torch.bfloat16 else 1e-5
    assert (mine.float() - wanted.float()).abs().max() <= limit * wanted.float().abs().max().clamp(min=1.0)


RAGGED = st.lists(
    st.tuples(st.sampled_from([0, 1, 15, 17, 130]), st.sampled_from([0, 1, 1, 2, 16, 75])), min_size=1, max_size=4
).filter(lambda rows: any(now for _, now in rows) and all(before + now for before, now in rows))


@settings(max_examples=30, deadline=None)
@given(
    rows=RAGGED,
    odd=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    window=st.sampled_from([None, 1, 9, 40]),
    turned=st.sampled_from(["", "halves", "neighbours"]),
    isa=st.sampled_from(VARIANTS or [""]),
    threads=st.sampled_from([1, min(2, available_cores())]),
    seed=st.integers(0, 2**16),
)
def test_latent_attention_equals_the_reference_on_ragged_batches(
    open_cpu, rows, odd, dtype, window, turned, isa, threads, seed
):
    """Both forms: rows of 75 queries are expanded, shorter ones are not."""
    torch.manual_seed(seed)
    spec = spec_of(dtype, odd=odd, window=window)
    layer, rope = layer_of(spec), rope_of(spec.rope_dim, turned == "neighbours") if turned else None
    mine, reference = open_cpu(isa, threads).latent(spec), ReferenceLatent(spec)
    assert isinstance(mine, KernelLatent)
    batch, num_blocks = make_batch(rows, np.random.default_rng(seed), window)
    first, _ = make_batch(rows, np.random.default_rng(seed), window)
    as_past(first, rows)
    caches = [poisoned(backend, num_blocks) for backend in (mine, reference)]
    for view in (first, batch):
        if not view.num_tokens:
            continue
        inputs, found = given_to(spec, view.num_tokens), []
        for at, backend in enumerate((mine, reference)):
            plan = backend.plan(view, key(view), group=0)
            out, caches[at] = backend.forward(*inputs, caches[at], plan, layer, rope=rope)
            found.append(out)
    assert_close(*found)  # a window's first step has seen blocks that it left


@settings(max_examples=30, deadline=None)
@given(
    rows=RAGGED,
    odd=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    whole=st.booleans(),
    top_k=st.sampled_from([1, 16, 40]),
    isa=st.sampled_from(VARIANTS or [""]),
    threads=st.sampled_from([1, min(2, available_cores())]),
    seed=st.integers(0, 2**16),
)
def test_queries_choose_and_attend_as_the_reference_does(open_cpu, rows, odd, dtype, whole, top_k, isa, threads, seed):
    """Of equal scores the lower positions. Scores that rounding may exchange differ by that little."""
    torch.manual_seed(seed)
    spec = spec_of(dtype, odd=odd, top_k=top_k)
    layer, rope, index_rope = layer_of(spec), rope_of(spec.rope_dim, True), rope_of(16, False)
    mine = open_cpu(isa, threads).latent(spec)
    reference = SparseLatent(spec, ReferenceLatent(dense_part(spec)))
    assert isinstance(mine, KernelSparse)
    batch, num_blocks = make_batch(rows, np.random.default_rng(seed), None)
    first, _ = make_batch(rows, np.random.default_rng(seed), None)
    as_past(first, rows)
    caches = [poisoned(backend, num_blocks) for backend in (mine, reference)]
    for view in (first, batch):
        if not view.num_tokens:
            continue
        inputs, index, chosen, found = (
            given_to(spec, view.num_tokens),
            index_for(spec, view.num_tokens, whole=whole),
            [],
            [],
        )
        for at, backend in enumerate((mine, reference)):
            plan = backend.plan(view, key(view), group=0)
            picked, caches[at] = backend.choose(index, caches[at], plan, layer, rope=None if whole else index_rope)
            chosen.append(picked)
            out, caches[at] = backend.forward(*inputs, caches[at], plan, layer, rope=rope, chosen=chosen[0])
            found.append(out)
        if whole:
            assert chosen[0].equal(chosen[1])
        else:
            same = (chosen[0] == chosen[1]).all(dim=1).float().mean()
            assert same > 0.9
        assert_close(*found)


@pytest.mark.parametrize("isa", VARIANTS)
def test_a_score_that_is_no_number_counts_as_the_lowest(open_cpu, isa):
    spec = spec_of("float32", top_k=4)
    layer = layer_of(spec)
    batch, num_blocks = make_batch([(0, 12), (0, 9)], np.random.default_rng(0), None)
    index = index_for(spec, 21, whole=True)
    index.keys[3] = torch.nan
    index.keys[5] = torch.inf
    backends = open_cpu(isa, 1).latent(spec), SparseLatent(spec, ReferenceLatent(dense_part(spec)))
    chosen = [b.choose(index, poisoned(b, num_blocks), b.plan(batch, key(batch), group=0), layer)[0] for b in backends]
    assert chosen[0].equal(chosen[1])


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("top_k", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_come_back_in_canonical_form(open_cpu, isa, top_k, dtype):
    spec = spec_of(dtype, odd=True, top_k=top_k)
    backend = open_cpu(isa, 1).latent(spec)
    cache = poisoned(backend, 6)
    arrays = {a.name: torch.randn(3, *a.shape).to(getattr(torch, dtype)) for a in spec.canonical(BLOCK)}
    cache = backend.import_arrays(cache, [4, 1, 2], arrays)
    cache = backend.copy_blocks(cache, [1], [5])
    cache = backend.zero_blocks(cache, [1])
    found = backend.export_arrays(cache, [4, 5, 2, 1])
    for name, array in arrays.items():
        assert found[name][:3].equal(array)
        assert not found[name][3].any()


@pytest.mark.parametrize("top_k", [0, 8])
def test_a_recorded_step_attends_as_an_eager_one(open_cpu, top_k):
    """One native piece. A later step's rows, lengths and places are those of its own plan."""
    torch.manual_seed(1)
    spec = spec_of("bfloat16", top_k=top_k)
    layer, rope = layer_of(spec), rope_of(spec.rope_dim, True)
    platform = open_cpu("", 1)
    backend = platform.latent(spec)
    before, num_blocks = make_batch([(0, 30), (0, 3), (0, 17), (0, 9), (0, 1)], np.random.default_rng(0), None)
    step, _ = make_batch([(30, 1), (3, 1), (17, 1), (9, 1), (1, 1)], np.random.default_rng(0), None)
    cache = poisoned(backend, num_blocks)
    inputs, index = given_to(spec, 33 + 27), index_for(spec, 33 + 27)

    def run(view, held, plan, given, keys):
        chosen = None
        if top_k:
            chosen, _ = backend.choose(keys, held, plan, layer, rope=rope_of_index)
        return backend.forward(*given, held, plan, layer, rope=rope, chosen=chosen)[0]

    rope_of_index = rope_of(16, False)
    run(before, cache, backend.plan(before, key(before), group=0), inputs, index)
    given, keys = given_to(spec, 5), index_for(spec, 5)
    plan = backend.plan(step, key(step), group=0)
    graphs = platform.graph_capture()
    handle = graphs.capture(lambda: run(step, cache, plan, given, keys), key(step))
    assert len(handle.pieces) == 1
    later = replace(
        step,
        query_start=torch.tensor([0, 1, 2, 2, 2, 2], dtype=torch.int32),
        seq_lens=torch.tensor([31, 4, 0, 0, 0], dtype=torch.int32),
        slot_mapping=torch.cat((step.slot_mapping[:2], torch.full((3,), -1))),
    )
    found = graphs.run(handle, [backend.plan(later, key(later), group=0, into=plan)])
    wanted = run(later, cache, backend.plan(later, key(later), group=0), given, keys)
    assert found.equal(wanted)
    assert wanted[:2].any() and not wanted[2:].any()


@pytest.mark.parametrize("isa", VARIANTS)
def test_a_row_of_nan_changes_no_bit_of_anothers_attention(open_cpu, isa):
    spec = spec_of("bfloat16", top_k=8)
    layer, backend = layer_of(spec), open_cpu(isa, 1).latent(spec)
    batch, num_blocks = make_batch([(0, 20), (0, 25), (0, 1)], np.random.default_rng(0), None)
    inputs, index = given_to(spec, 46), index_for(spec, 46)
    found = []
    for spoil in (False, True):
        given = [x.clone() for x in inputs]
        keys = IndexInputs(queries=index.queries.clone(), keys=index.keys.clone(), weights=index.weights.clone())
        if spoil:
            for x in (*given, keys.queries, keys.keys, keys.weights):
                x[20:45] = torch.nan
        cache, plan = poisoned(backend, num_blocks), backend.plan(batch, key(batch), group=0)
        chosen, cache = backend.choose(keys, cache, plan, layer)
        found.append((chosen, backend.forward(*given, cache, plan, layer, chosen=chosen)[0]))
    for clean, spoilt in zip(*found, strict=True):
        assert clean[:20].equal(spoilt[:20]) and clean[45:].equal(spoilt[45:])
