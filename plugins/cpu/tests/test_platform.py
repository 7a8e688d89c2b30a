"""What the plugin says of itself: which kernels there are, who gets which cores, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anychip.plugin_api import EngineConfig, LinearPart, LinearSpec, MoESpec, Placement, Routing, Unsupported
from anychip_cpu import MANIFEST, native
from anychip_cpu.probe import available_cores, probe


def test_a_variant_that_is_not_here_is_refused_with_those_that_are(open_cpu):
    with pytest.raises(Unsupported, match=r"isa=sse1: was not built; there are .*reference"):
        open_cpu("sse1")


@pytest.mark.parametrize("isa", native.usable())
def test_a_variant_goes_by_its_name(open_cpu, isa):
    assert open_cpu(isa).isa == isa


def test_more_threads_than_cores_are_refused_by_name(open_cpu):
    with pytest.raises(Unsupported, match=rf"threads={available_cores() + 1}: this process may use"):
        open_cpu(threads=available_cores() + 1)


def test_without_kernels_pytorch_serves_and_says_so(open_cpu, monkeypatch, caplog):
    monkeypatch.setattr(native, "usable", list)
    opened = open_cpu("")
    assert opened.kernels is None
    assert "C++17 compiler" in caplog.text
    assert native.version() is None
    spec = LinearSpec(in_features=4, out_features=4, parts=(LinearPart(name="all", offset=0, rows=4),), dtype="float32")
    assert opened.linear(spec).name == "reference"


@pytest.mark.parametrize("isa", [*native.usable(), native.REFERENCE])
def test_routing_is_softmax_then_top_k_renormalised(open_cpu, isa):
    spec = MoESpec(num_experts=3, top_k=2, hidden_size=4, intermediate_size=4, dtype="float32")
    routing = open_cpu(isa).moe(spec).route(torch.tensor([[0.0, 1.0, 2.0]]))
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
