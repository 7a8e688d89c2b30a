"""How graphs are cut into pieces and replayed, with a stand-in for torch.cuda whose graphs record CPU operations."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anychip_triton.graph import DeviceGraphs


class StandInGraph(TorchDispatchMode):
    """Records what runs between capture_begin and capture_end, and does it again into the same storage."""

    def __init__(self):
        super().__init__()
        self.tasks, self.pool = [], None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.tasks.append((func, args, kwargs or {}, result))
        return result

    def capture_begin(self, pool, capture_error_mode):
        self.pool = pool
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)

    def replay(self):
        for func, args, kwargs, result in self.tasks:
            new = func(*args, **kwargs)
            if new.data_ptr() != result.data_ptr():
                result.copy_(new)


@pytest.fixture
def cuda(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": StandInGraph, "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(), "synchronize": lambda: None, "graph_pool_handle": object,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("heeds_out", [True, False])
def test_pieces_see_new_inputs_and_calls_see_new_plans(cuda, heeds_out):
    x, runs = torch.arange(6.0), []

    def layer(x, run_outside_graph):
        doubled = x * 2

        def call(plans, out):
            runs.append(plans[0])
            result = doubled + plans[0]
            return out.copy_(result) if heeds_out and out is not None else result

        return run_outside_graph(call) * 3

    def model(run_outside_graph):
        return layer(layer(x, run_outside_graph), run_outside_graph)

    graphs = DeviceGraphs()
    handle = graphs.capture_pieces(model, [1.0], 6)
    assert [type(piece).__name__ for piece in handle.pieces] == ["StandInGraph", "EagerCall"] * 2 + ["StandInGraph"]
    assert len({piece.pool for piece in handle.pieces[::2]}) == 1
    assert handle.pieces[1].out is handle.pieces[3].out  # layers share what calls write to
    runs.clear()
    for shift, plan in ((0.0, 1.0), (10.0, 5.0), (0.0, 1.0)):
        x.copy_(torch.arange(6.0) + shift)
        expected = (((torch.arange(6.0) + shift) * 2 + plan) * 3 * 2 + plan) * 3
        assert graphs.run_pieces(handle, [plan]).equal(expected)
    assert runs == [1.0, 1.0, 5.0, 5.0, 1.0, 1.0]


def test_pieces_are_paid_for():
    graphs = DeviceGraphs()
    assert graphs.reserve([], []) == 0
    assert graphs.reserve([], [16, 32]) > graphs.reserve([], [16]) > 0


def test_a_pool_is_used_as_long_as_a_graph_of_it_is_there(cuda):
    """Torch gives a pool up with its last graph: an id that was used before is an error then."""
    graphs, x = DeviceGraphs(), torch.arange(3.0)

    def capture():
        return graphs.capture_pieces(lambda run_outside_graph: x * 2, [], 3)

    def pool(handle):
        return handle.pieces[0].pool

    first = capture()
    second = capture()
    assert pool(second) is pool(first)
    given_up = pool(first)
    del first
    assert pool(capture()) is given_up  # the second still holds it
    del second
    assert pool(capture()) is not given_up
