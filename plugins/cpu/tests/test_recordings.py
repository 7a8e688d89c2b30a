"""What recordings are made of: their storage, the operators that are kernels there, and rows that follow the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.plugin_api import LinearPart, LinearSpec, ShapeKey
from anychip_cpu import native
from anychip_cpu.arena import Arena
from anychip_cpu.graph import CpuGraphs, Recordings
from anychip_cpu.shapes import _TOKENS

needs_kernels = pytest.mark.skipif(not native.usable(), reason="no kernels were compiled")
VARIANTS = native.usable()


def key(num_tokens: int) -> ShapeKey:
    return ShapeKey(num_tokens=num_tokens, num_reqs=num_tokens, num_samples=num_tokens, max_query_len=0, num_pages=1)


class Step:
    """A plan of so many tokens, as replays want it."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 7, 64, 100, 5000]), st.sampled_from([torch.float32, torch.bfloat16, torch.int64])
        ),
        max_size=40,
    ),
    st.randoms(),
)
def test_storage_in_use_is_never_given_out_and_freed_storage_is(sizes, random):
    arena, live = Arena(), dict[int, tuple[torch.Tensor, int]]()
    for number, (size, dtype) in enumerate(sizes):
        tensor = arena.empty((size,), dtype)
        assert not tensor.any(), "it begins as zeros"
        tensor.fill_(number + 1)
        live[number] = (tensor.view(1, -1), number + 1)  # a view holds the storage as well
        del tensor
        if random.random() < 0.5:
            del live[random.choice(list(live))]
        assert all((held == value).all() for held, value in live.values())
    assert all(arena.holds(held) for held, _ in live.values())
    before = arena.nbytes
    live.clear()
    for size, dtype in sizes:
        arena.empty((size,), dtype)
    assert arena.nbytes == before, "it is taken from what was freed"


@needs_kernels
@pytest.mark.parametrize("isa", VARIANTS)
@settings(deadline=None, max_examples=25)
@given(
    rows=st.sampled_from(_TOKENS),
    count=st.integers(1, 67),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_operators_have_torchs_bits_for_as_many_rows_as_a_step_has(isa, rows, count, dtype, seed):
    """All of them in one step, which runs as one piece; the rows behind the step's stay as they were."""
    count = min(count, rows)
    kernels, generator = native.load(isa), torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    table = torch.randn(50, 24, generator=generator).to(kind)
    ids = torch.randint(-3, 50, (rows,), generator=generator, dtype=torch.int32)
    last = torch.randint(0, 50, (9,), generator=generator, dtype=torch.int32)
    slots = torch.randint(0, 9, (rows,), generator=generator, dtype=torch.int32)

    def step(n: int = rows) -> tuple[torch.Tensor, ...]:
        known = torch.where(ids[:n] < 0, last[slots[:n]], ids[:n])
        found = table[known]
        total = found * 0.37 + found * found
        return (
            known,
            total,
            total.float(),
            total.float().to(torch.bfloat16),
            last.index_copy(0, slots[:n].long(), known),
        )

    graphs = CpuGraphs(kernels, Recordings())
    handle = graphs.capture(step, key(rows))
    assert len(handle.pieces) == 1, [type(piece).__name__ for piece in handle.pieces]
    for fresh in range(2):
        ids.copy_(torch.randint(-3, 50, (rows,), generator=generator, dtype=torch.int32))
        slots.copy_(torch.randperm(9, generator=generator, dtype=torch.int32)[torch.arange(rows) % 9])
        marks = [out.clone() for out in handle.output]
        replayed, eager = graphs.run(handle, [Step(count)]), step(count)
        for mine, wanted, mark in zip(replayed[:-1], eager[:-1], marks[:-1], strict=True):
            assert mine[:count].equal(wanted), fresh
            if mine.is_floating_point():
                assert mine[count:].equal(mark[count:]), "padding is left alone"
        if count <= 9:  # more would write one place twice
            assert replayed[-1].equal(eager[-1])


@needs_kernels
@settings(deadline=None, max_examples=20)
@given(rows=st.sampled_from(_TOKENS[1:]), data=st.data())
def test_kernels_take_as_many_rows_as_a_step_has(open_cpu, rows, data):
    """Products and norms, and norms by head, for every count that a recording holds."""
    count = data.draw(st.integers(1, rows))
    platform = open_cpu("", 1)
    spec = LinearSpec(
        in_features=64, out_features=96, parts=(LinearPart(name="all", offset=0, rows=96),), dtype="bfloat16"
    )
    kernel, ops = platform.linear(spec), platform.ops()
    packed = kernel.begin()
    kernel.load(packed, "all", torch.randn(96, 64).bfloat16())
    packed = kernel.finish(packed)
    x, weight, by_head = torch.randn(rows, 64).bfloat16(), torch.randn(64).bfloat16(), torch.randn(32).bfloat16()

    def step(n: int = rows) -> tuple[torch.Tensor, torch.Tensor]:
        normed = ops["rms_norm"](x=x[:n], weight=weight, eps=1e-6)
        product = kernel.apply(normed, packed)
        return product, ops["rms_norm"](x=product.view(n, 3, 32), weight=by_head, eps=1e-6)

    graphs = platform.graph_capture()
    handle = graphs.capture(step, key(rows))
    assert len(handle.pieces) == 1
    for n in (count, rows):
        x.copy_(torch.randn(rows, 64))
        for mine, wanted in zip(graphs.run(handle, [Step(n)]), step(n), strict=True):
            assert mine[:n].equal(wanted)
