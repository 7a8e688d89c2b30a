"""State layers by compiled kernels, of every variant that this processor runs, against the reference: ragged rows that
begin and go on, padding, odd sizes, poisoned blocks, one thread and two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.ops.reference import ReferenceStates
from anychip.ops.table import resolve_ops
from anychip.plugin_api import RECURRENCES, ShapeKey, StateLayer, StateSpec, StateView, state_spec
from anychip_cpu import native
from anychip_cpu.probe import available_cores
from anychip_cpu.states import CpuStates

OPS = resolve_ops("cpu", {}).ops
VARIANTS = native.usable()
KINDS = ("causal_conv", "gated_delta", "kda", "lightning", "ssd", "selective_scan")
BLOCKS = 12
pytestmark = pytest.mark.skipif(not VARIANTS, reason="no kernels were compiled")


def view_of(rows: list[tuple[int, int]], padding: int = 0, padded_rows: int = 0, seed: int = 0) -> StateView:
    """`rows` are (taken in before, taken in now)."""
    counts = np.array([now for _, now in rows])
    starts = np.concatenate(([0], np.cumsum(counts), np.full(padded_rows, counts.sum())))
    lengths = [before + now if now else 0 for before, now in rows] + [0] * padded_rows
    blocks = np.random.default_rng(seed).permutation(np.arange(1, BLOCKS))[: len(rows)]
    return StateView(
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        state_blocks=torch.tensor([*blocks, *[0] * padded_rows], dtype=torch.int32),
        num_reqs=len(rows) + padded_rows,
        num_tokens=int(counts.sum()) + padding,
        max_query_len=max(counts, default=0),
        host_query_lens=counts,
    )


def key_of(view: StateView) -> ShapeKey:
    return ShapeKey(
        num_tokens=view.num_tokens, num_reqs=view.num_reqs, num_samples=view.num_reqs, max_query_len=0, num_pages=1
    )


class Case:
    """A recurrence of some sizes, its weights, and inputs for a view."""

    def __init__(self, kind: str, dtype: str, dims: dict[str, int], seed: int = 0) -> None:
        self.known, self.dims = RECURRENCES[kind], dims
        self.random = torch.Generator().manual_seed(seed)
        spec_dims = {name for shape in self.known.arrays.values() for name in shape}
        self.spec: StateSpec = state_spec(kind, dtype, **{name: dims[name] for name in spec_dims})
        self.kind = kind
        weights = {name: self._drawn(name, shape, ()) for name, shape in self.known.weights.items()}
        if dims.get("past") == 1:
            weights.pop("bias", None)  # one may be left out
        self.layer = StateLayer(index=0, ops=OPS, weights=weights)

    def inputs(self, num_tokens: int) -> dict[str, torch.Tensor]:
        return {name: self._drawn(name, shape, (num_tokens,)) for name, shape in self.known.inputs.items()}

    def _drawn(self, name: str, shape: tuple[str, ...], lead: tuple[int, ...]) -> torch.Tensor:
        """Decays as models have them: below zero, or steps above it. Inputs are views of something wider."""
        sizes = tuple(self.dims[dim] for dim in shape)
        wide = (*lead, sizes[0], *sizes[1:-1], sizes[-1] + 3) if lead and len(sizes) > 1 else (*lead, *sizes)
        x = torch.randn(wide, generator=self.random)
        if lead and len(sizes) > 1:
            x = x[..., 2:-1]
        if name in ("g", "a"):
            x = -x.abs() * 0.3
        elif name in ("dt", "slope"):
            x = x.abs() * 0.5
        elif name == "beta":
            x = x.sigmoid()
        return x if name in self.known.wide else x.to(getattr(torch, self.spec.dtype))


def dims_of(kind: str, odd: bool) -> dict[str, int]:
    heads, groups = (6, 3) if kind in ("gated_delta", "ssd") else (3, 3)
    sizes = {"key_dim": 19, "value_dim": 37, "state_dim": 21, "channels": 53, "head_dim": 27} if odd else {
        "key_dim": 64, "value_dim": 128, "state_dim": 16, "channels": 160, "head_dim": 64
    }  # fmt: skip
    past = 1 if odd else 3
    return {**sizes, "heads": heads, "groups": groups, "past": past, "width": past + 1}


def assert_close(mine: torch.Tensor, wanted: torch.Tensor) -> None:
    limit = 2e-2 if mine.dtype == torch.bfloat16 else 2e-5
    scale = wanted.float().abs().max().clamp(min=1.0)
    assert (mine.float() - wanted.float()).abs().max() <= limit * scale


def fresh_caches(*backends: CpuStates | ReferenceStates) -> list[dict[str, torch.Tensor]]:
    """Whose blocks hold what is no number."""
    return [b.make_cache(torch.full((BLOCKS * b.state_bytes(),), 0xFF, dtype=torch.uint8), BLOCKS) for b in backends]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 0, 1, 2, 9]), st.sampled_from([0, 1, 1, 2, 3, 5, 8, 33, 70])),
        min_size=1, max_size=5,
    ).filter(lambda rows: any(now for _, now in rows)),
    odd=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    padding=st.sampled_from([0, 3]),
    isa=st.sampled_from(VARIANTS or [""]),
    threads=st.sampled_from([1, min(2, available_cores())]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_states_equal_the_reference_on_ragged_batches(open_cpu, kind, rows, odd, dtype, padding, isa, threads, seed):
    """A step that some rows have taken before, and one that goes on from it beside fresh rows."""
    case = Case(kind, dtype, dims_of(kind, odd), seed)
    mine, reference = open_cpu(isa, threads).state(case.spec), ReferenceStates(case.spec)
    assert isinstance(mine, CpuStates)
    caches = fresh_caches(mine, reference)
    first = view_of([(0, before) for before, _ in rows], seed=seed)
    second = view_of(rows, padding, padded_rows=padding, seed=seed)
    for view in (first, second):
        if not view.num_tokens:
            continue
        inputs, found = case.inputs(view.num_tokens), []
        for at, backend in enumerate((mine, reference)):
            out, caches[at] = backend.forward(inputs, caches[at], backend.plan(view, key_of(view), group=0), case.layer)
            found.append(out)
        tokens = int(view.query_start[-1])
        assert_close(found[0][:tokens], found[1][:tokens])
        assert not found[0][tokens:].any()
    ids = [int(block) for block, (before, now) in zip(second.state_blocks, rows, strict=False) if before + now]
    held = [backend.export_arrays(cache, ids) for backend, cache in zip((mine, reference), caches, strict=True)]
    for name in held[0]:
        assert_close(held[0][name], held[1][name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", VARIANTS)
def test_a_row_of_nan_changes_no_bit_of_another(open_cpu, kind, isa):
    case = Case(kind, "bfloat16", dims_of(kind, odd=False))
    backend = open_cpu(isa, 1).state(case.spec)
    view = view_of([(0, 9), (0, 12), (0, 1)])
    clean = case.inputs(view.num_tokens)
    spoilt = {name: array.clone() for name, array in clean.items()}
    for array in spoilt.values():
        array[9:21] = torch.nan
    found = []
    for inputs in (clean, spoilt):
        [cache] = fresh_caches(backend)
        out, cache = backend.forward(inputs, cache, backend.plan(view, key_of(view), group=0), case.layer)
        found.append((out, backend.export_arrays(cache, view.state_blocks.tolist())))
    (out, states), (spoilt_out, spoilt_states) = found
    assert out[:9].equal(spoilt_out[:9]) and out[21:].equal(spoilt_out[21:])
    assert spoilt_out[9:21].isnan().any()
    for name in states:
        assert states[name][[0, 2]].equal(spoilt_states[name][[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_advances_states_as_an_eager_one(open_cpu, kind):
    """One native piece, for as many rows as a step has; those behind stay as they are."""
    platform = open_cpu("", 1)
    case = Case(kind, "bfloat16", dims_of(kind, odd=False))
    backend = platform.state(case.spec)
    recorded_for, now = view_of([(0, 1)] * 5), view_of([(4, 1), (0, 1)], padding=3, padded_rows=3, seed=1)
    inputs = case.inputs(5)
    [cache], [eager] = fresh_caches(backend), fresh_caches(backend)
    for held in (cache, eager):
        for array in held.values():
            array.fill_(0.25)
    plan = backend.plan(recorded_for, key_of(recorded_for), group=0)
    graphs = platform.graph_capture()
    before = {name: held.clone() for name, held in cache.items()}
    handle = graphs.capture(lambda: backend.forward(inputs, cache, plan, case.layer)[0], key_of(recorded_for))
    assert len(handle.pieces) == 1
    assert all(held.equal(before[name]) for name, held in cache.items()), "recording computes nothing"
    plan = backend.plan(now, key_of(now), group=0, into=plan)
    found = graphs.run(handle, [plan])
    wanted, eager = backend.forward(inputs, eager, backend.plan(now, key_of(now), group=0), case.layer)
    assert found.equal(wanted)
    assert all(held.equal(eager[name]) for name, held in cache.items())
