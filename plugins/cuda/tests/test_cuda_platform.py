"""What can be seen of the plugin where there is no NVIDIA device: its probe, over a stand-in for the driver's library,
its refusals and its imports. Kernels: plugins/triton/tests and the suite's triton-interpreter."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from anychip.launch.build import fill_unset
from anychip.ops.reference import REFERENCE
from anychip.plugin_api import EngineConfig, Placement, PlatformContext, ProbeResult, Unsupported
from anychip_cuda import MANIFEST
from anychip_cuda import probe as probing
from anychip_cuda.platform import CudaPlatform


class Driver:
    """NVML's functions over two devices."""

    uuids = ("GPU-aaaa-1111", "GPU-bbbb-2222")

    def nvmlInit_v2(self):
        return 0

    def nvmlShutdown(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.uuids)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetUUID(self, handle, buffer, size):
        buffer.value = self.uuids[handle.value - 1].encode()
        return 0

    def nvmlDeviceGetName(self, handle, buffer, size):
        buffer.value = f"NVIDIA Test {handle.value - 1}".encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.total = 80 << 30
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
        major._obj.value, minor._obj.value = 9, 0
        return 0

    def nvmlSystemGetDriverVersion(self, buffer, size):
        buffer.value = b"580.65"
        return 0


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_probe_lists_what_the_driver_has(driver):
    result = probing.probe()
    assert [device.name for device in result.devices] == ["NVIDIA Test 0", "NVIDIA Test 1"]
    assert result.devices[0].total_memory == 80 << 30 and result.devices[0].detail == "compute capability 9.0"
    assert result.versions == {"driver": "580.65"} and not result.reason


@pytest.mark.parametrize(("uuids", "order", "needed"), [(1, "", False), (2, "", True), (2, "PCI_BUS_ID", False)])
def test_a_worker_gets_an_environment_where_the_order_of_devices_matters(driver, monkeypatch, uuids, order, needed):
    monkeypatch.setattr(Driver, "uuids", Driver.uuids[:uuids])
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    placement = Placement(rank=0, world_size=1, device_indexes=(0,))
    assert bool(MANIFEST.worker_env(EngineConfig(), placement)) is needed


def test_a_gpu_takes_larger_steps_unless_told_otherwise():
    decision = MANIFEST.negotiate(EngineConfig(), ProbeResult())
    for rows in (7, EngineConfig().resolved_max_num_seqs):
        filled = fill_unset(EngineConfig(max_num_seqs=rows), decision)
        assert (filled.resolved_max_num_seqs, filled.resolved_max_num_batched_tokens) == (rows, 8192)


def test_the_probe_counts_as_the_runtime_does(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (device,) = probing.probe().devices
    assert device.index == 0 and device.name == "NVIDIA Test 1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = probing.probe()
    assert not hidden.devices and hidden.reason == "CUDA_VISIBLE_DEVICES hides all 2 devices" and hidden.remedy


def test_without_a_driver_there_is_a_reason_and_a_remedy(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    result = probing.probe()
    assert not result.devices and "no NVIDIA driver" in result.reason and "install" in result.remedy


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_torch_without_cuda_is_refused_by_name():
    context = PlatformContext(
        manifest=MANIFEST, device_indexes=(0,), options=MANIFEST.options(), probe=ProbeResult(), reference=REFERENCE
    )
    with pytest.raises(Unsupported, match="is not built for CUDA; install torch's CUDA build"):
        CudaPlatform(context)


def test_announcing_the_platform_imports_no_runtime():
    program = (
        "import sys, anychip_cuda, anychip_cuda.probe; print([m for m in ('torch', 'triton') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
