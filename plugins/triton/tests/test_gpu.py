"""What a platform on torch.cuda says of faults and memory, with a stand-in for torch.cuda."""

from __future__ import annotations

import pytest
import torch

from anychip.ops.reference import REFERENCE
from anychip.ops.table import resolve_ops
from anychip.plugin_api import (
    Capabilities,
    DeviceFault,
    GraphLevel,
    PlatformContext,
    PlatformManifest,
    ProbeResult,
)
from anychip.plugin_api.ops import COMPILED_OPS
from anychip_triton import gpu
from anychip_triton.compiler import TorchCompiler
from anychip_triton.options import GpuOptions
from anychip_triton.targets import TARGETS

GIB = 2**30


class Card(gpu.GpuPlatform):
    def find_target(self):
        return TARGETS["sm_90"]


def open_card(**options) -> Card:
    manifest = PlatformManifest(
        name="card", package="p", api_version="0.2", summary="", probe="", platform="", options=GpuOptions
    )
    return Card(
        PlatformContext(
            manifest=manifest, device_indexes=(1,), options=GpuOptions(**options), probe=ProbeResult(),
            reference=REFERENCE,
        )
    )  # fmt: skip


@pytest.fixture
def cuda(monkeypatch):
    """One of whose 80 GiB 3 are free, and 2 more are torch's to use."""
    values = {
        "set_device": None, "mem_get_info": (3 * GIB, 80 * GIB), "memory_reserved": 5 * GIB,
        "memory_allocated": 3 * GIB,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def test_memory_that_torch_keeps_unused_is_free(cuda):
    memory = open_card().memory(1)
    assert memory.free == 5 * GIB and memory.total == 80 * GIB


def test_out_of_memory_says_what_was_asked_what_is_free_and_what_to_lower(cuda):
    text = "CUDA out of memory. Tried to allocate 12.50 GiB. GPU 1 has a total capacity of 80.00 GiB of which"
    fault = open_card().explain(torch.OutOfMemoryError(text))
    assert fault is not None and not fault.fatal and fault.kind == "out_of_memory"
    assert "cuda:1 is out of memory: 12.50 GiB asked, 3.00 of 80.00 GiB free" in str(fault)
    assert "lower --max-num-batched-tokens" in str(fault)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: device-side assert triggered",
        "HIP error: unspecified launch failure",
    ],
)
def test_a_device_that_is_lost_is_a_fatal_fault_of_one_line(cuda, text):
    fault = open_card().explain(RuntimeError(text))
    assert fault is not None and fault.fatal and "\n" not in str(fault) and "restart the engine" in str(fault)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("illegal access"), KeyError("x")])
def test_what_is_not_the_devices_is_not_explained(cuda, error):
    assert open_card().explain(error) is None


def test_work_that_does_not_end_is_a_fault_within_the_deadline(cuda, monkeypatch):
    class Never:
        def query(self):
            return False

    monkeypatch.setattr(gpu, "DeviceEvent", Never)
    with pytest.raises(DeviceFault, match="cuda:1 has not finished its work within 0.01 s") as raised:
        open_card().health(0.01)
    assert raised.value.fatal and raised.value.kind == "timeout"


def test_a_compiler_in_place_of_the_fused_kernels_is_an_option(cuda):
    assert open_card().compiler() is None and "rms_norm" in open_card().ops()
    card = open_card(compile=True)
    assert isinstance(card.compiler(), TorchCompiler) and card.ops().keys() & COMPILED_OPS == set()
    assert open_card().capabilities.epilogues and not card.capabilities.epilogues
    served = resolve_ops("card", card.ops(), compiler=card.compiler()).served_by
    assert served["residual_norm_quant"] == "card's compiler, from the reference"
    assert served["sample"].startswith("card (anychip_triton.ops")


@pytest.mark.parametrize("rows", [1, 5])
def test_compiled_regions_are_whole_and_compute_what_the_reference_does(rows):
    table = resolve_ops("card", {}, compiler=TorchCompiler(backend="aot_eager")).ops
    x, residual, weight = torch.randn(rows, 64), torch.randn(rows, 64), torch.randn(64)
    plain = resolve_ops("card", {}).ops
    for ops_call in (
        lambda ops: ops.rms_norm(x=x, weight=weight, eps=1e-6),
        lambda ops: ops.residual_norm_quant(x=x, residual=residual, weight=weight, eps=1e-6, unit_offset=True)[0],
        lambda ops: ops.gate_up_act_quant(gate_up=x, activation="gelu_tanh"),
        lambda ops: ops.softcap(x=x, cap=30.0),
    ):
        torch.testing.assert_close(ops_call(table), ops_call(plain))


def test_graphs_are_an_option_that_capabilities_tell(cuda):
    assert open_card().capabilities.graph_level is GraphLevel.FULL
    without = open_card(graphs=False)
    assert without.capabilities.graph_level is Capabilities().graph_level
    assert without.graph_capture().level is GraphLevel.NONE
