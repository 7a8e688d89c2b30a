"""Devices, memory, streams, events and torch's own ops of the simulator."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("anychip_npu_simulator.runtime", reason="needs torch_npu: make ascend-test", exc_type=ImportError)

import torch
import torch.nn.functional as F
import torch_npu
from anychip_npu_simulator import aten, cann, machine
from anychip_npu_simulator.calls import OPS
from anychip_npu_simulator.errors import Refused
from anychip_npu_simulator.kernels import has_meta
from anychip_npu_simulator.table import table
from anychip_npu_simulator.tally import Count, counts, total

WITHOUT_META = {"npu_convert_weight_to_int4pack"}
"""The vendor has no meta function for this, and none for npu_format_cast. Of variants and workspaces, that of their op
is asked."""


def new_process(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from anychip_npu_simulator.install import install; install()\n" + program],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.rstrip().splitlines()[-1] if done.stdout.strip() else ""


@pytest.mark.parametrize(
    ("soc", "generation"),
    [("Ascend310P3", "310P"), ("Ascend910B4", "910B"), ("Ascend910_9392", "910C"), ("Ascend950PR", "950")],
)
def test_the_chip_is_chosen_by_the_environment(soc, generation):
    program = "import torch, torch_npu; from anychip_npu_simulator.machine import machine\n"
    program += "print(torch.npu.get_device_name(0), machine().generation)"
    assert new_process(program, NPU_SIMULATOR_SOC=soc) == f"{soc} {generation}"


def test_an_unknown_chip_is_an_error(monkeypatch):
    monkeypatch.setenv("NPU_SIMULATOR_SOC", "Ascend220")
    with pytest.raises(ValueError, match="Ascend220"):
        machine.machine()


def test_a_950_keeps_weights_as_they_are():
    """The wheel itself turns internal formats off there, whatever is set."""
    program = """
import torch, torch_npu
torch.npu.config.allow_internal_format = True
try:
    torch_npu.npu_format_cast(torch.ones(16, 16).half().npu(), 29)
except RuntimeError as error:
    print("allowed: 2 (ND) on a 950" in str(error))
"""
    assert new_process(program, NPU_SIMULATOR_SOC="Ascend950PR") == "True"


def test_several_devices_are_apart():
    program = """
import torch, torch_npu
a, b = torch.ones(3, device="npu:0"), torch.full((3,), 2.0, device="npu:3")
print(torch.npu.device_count(), b.device, (b.to("npu:0") + a).tolist(), torch.npu.memory_allocated(3) > 0, end=" ")
try:
    a + b
except RuntimeError as error:
    print("one device" in str(error))
"""
    assert new_process(program, NPU_SIMULATOR_DEVICES="4") == "4 npu:3 [3.0, 3.0, 3.0] True True"


def test_memory_runs_out_with_the_vendors_error():
    program = """
import torch, torch_npu
print(torch.npu.mem_get_info()[1], end=" ")
try:
    torch.empty(2**28, device="npu")
except torch.OutOfMemoryError as error:
    print("out of memory" in str(error))
"""
    assert new_process(program, NPU_SIMULATOR_MEMORY=str(2**28)) == f"{2**28} True"


def test_the_allocator_counts_and_gives_back():
    before = torch.npu.memory_allocated()
    x = torch.empty(1 << 20, device="npu")
    assert torch.npu.memory_allocated() - before >= 4 << 20
    del x
    assert torch.npu.memory_allocated() == before


def test_events_and_streams_answer():
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.npu.stream(torch.npu.Stream()):
        x = torch.ones(3, device="npu") + 1
    end.record()
    end.synchronize()
    torch.npu.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0 and x.tolist() == [2, 2, 2]


def test_pinned_memory_is_known_as_such():
    assert torch.empty(5).pin_memory().is_pinned() and not torch.empty(5).is_pinned()


def test_the_vendors_c_code_may_compute_nothing_unseen():
    """Operators of the old interface are refused by name; success with nothing done would be wrong numbers."""
    library = cann.load()
    assert library.aclopCompileAndExecute(b"MatMulV2", 0, None, None, 0, None, None) == 207000
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert b"MatMulV2 is not simulated" in library.aclGetRecentErrMsg()


# -- torch's ops -------------------------------------------------------------------------------------------

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
I = torch.tensor([2, 0])  # noqa: E741

CASES = {
    "matmul": lambda x, i: x @ x.T,
    "linear": lambda x, i: F.linear(x, x, x[:, 0]),
    "broadcast with a number of the host": lambda x, i: x + torch.tensor(2.0),
    "index": lambda x, i: x[i],
    "mask": lambda x, i: x[x > 0],
    "assignment by index": lambda x, i: x.index_put((i,), x[:2] * 3),
    "assignment through a view": lambda x, i: x.clone().t().fill_diagonal_(1.5),
    "out of the right size": lambda x, i: torch.mm(x, x.T, out=x.new_empty(4, 4)),
    "out that grows": lambda x, i: torch.add(x, x, out=x.new_empty(0)),
    "several results": lambda x, i: torch.cat(tuple(r.to(x.dtype) for r in x.topk(2))),
    "in place over a list": lambda x, i: torch.stack(torch._foreach_add([x, x * 2], 1.0)),
    "scatter": lambda x, i: x.clone().scatter_(1, i[None].expand(4, 2), 9.0),
    "softmax and sorting": lambda x, i: x.softmax(-1).sort(dim=-1, descending=True, stable=True).values,
    "factories": lambda x, i: (
        torch.arange(6, device=x.device) + x.new_zeros(6) + torch.ones_like(x[0]) + torch.eye(6, device=x.device)[1]
    ),
    "one_hot": lambda x, i: F.one_hot(i, 4),
    "attention of torch": lambda x, i: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "layer norm": lambda x, i: F.layer_norm(x, (6,)),
    "bfloat16 and back": lambda x, i: (x.bfloat16() * 3).float(),
    "strides": lambda x, i: x.t().contiguous().as_strided((2, 3), (3, 1), 2),
    "where and clamp": lambda x, i: torch.where(x > 0, x.clamp(max=0.5), 0.0),
    "embedding": lambda x, i: F.embedding(i, x),
    "cumulative sums in place": lambda x, i: x.clone().cumsum_(1),
    "einsum": lambda x, i: torch.einsum("ab,cb->ac", x, x),
    "copy between dtypes": lambda x, i: torch.empty(4, 6, dtype=torch.int32, device=x.device).copy_(x * 10),
}


@pytest.mark.parametrize("case", CASES)
def test_ops_of_torch_give_what_the_host_gives(case):
    on_host, on_device = CASES[case](X, I), CASES[case](X.npu(), I.npu())
    assert on_device.device.type == "npu" and on_device.dtype == on_host.dtype
    assert torch.equal(on_device.cpu(), on_host)


def test_nearly_every_op_of_torch_has_a_kernel():
    assert len(aten.overrides()) > 1000


def test_random_numbers_follow_the_devices_generator():
    torch.npu.manual_seed(3)
    first, second = torch.randn(4, device="npu"), torch.randn(4, device="npu")
    torch.npu.manual_seed(3)
    assert torch.equal(torch.randn(4, device="npu"), first) and not torch.equal(first, second)


def test_tensors_of_the_host_are_refused_beside_the_devices():
    with pytest.raises(Refused, match="tensor 1 is on cpu"):
        X.npu() + X


def test_products_of_float64_are_refused():
    with pytest.raises(Refused, match="float64"):
        X.npu().double() @ X.npu().double().T


def test_bfloat16_is_refused_on_a_310p(monkeypatch):
    monkeypatch.setenv("NPU_SIMULATOR_SOC", "Ascend310P3")
    with pytest.raises(Refused, match="bfloat16"):
        X.npu().bfloat16() @ X.npu().bfloat16().T
    with pytest.raises(Refused, match="input is bfloat16"):
        torch_npu.npu_rms_norm(X.npu().bfloat16(), X[0].npu().bfloat16())


def test_fractal_nz_is_for_products_and_copies_alone():
    torch.npu.config.allow_internal_format = True
    w = torch_npu.npu_format_cast(X.half().npu(), 29)
    assert int(torch_npu.get_npu_format(w)) == 29 and torch.equal(w.cpu(), X.half())
    assert torch.equal((X.half().npu() @ w.t()).cpu(), X.half() @ X.half().T)
    with pytest.raises(Refused, match="FRACTAL_NZ"):
        w + 1
    assert torch.equal(torch_npu.npu_format_cast(w, 2) + 1, X.half().npu() + 1)


# -- the vendor's second opinion ---------------------------------------------------------------------------


def test_the_table_of_ops_without_a_meta_function_is_true():
    assert {name for name, op in OPS.items() if not has_meta(op.opinion or name)} == WITHOUT_META


def test_the_readme_has_the_table_of_ops():
    assert table() in (Path(__file__).parents[1] / "README.md").read_text()


def test_calls_are_counted_with_those_that_the_vendor_confirmed():
    before = counts["npu::npu_swiglu"].confirmed if "npu::npu_swiglu" in counts else 0
    torch_npu.npu_swiglu(X.npu())
    assert counts["npu::npu_swiglu"].confirmed == before + 1


def test_processes_write_their_counts_where_they_can_be_added_up(tmp_path):
    program = (
        "import torch, torch_npu; [torch_npu.npu_swiglu(torch.ones(2, 4, device='npu')) for _ in range(3)]; print()"
    )
    for _ in range(2):
        new_process(program, NPU_SIMULATOR_COUNTS=str(tmp_path))
    assert total(tmp_path) == {"npu::npu_swiglu": Count(calls=6, confirmed=6)}
