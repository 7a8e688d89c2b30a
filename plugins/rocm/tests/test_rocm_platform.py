"""What can be seen of the plugin where there is no AMD device: its probe, over a stand-in for the driver's files, its
refusals and its imports. Kernels: plugins/triton/tests and the suite's triton-interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from anychip.ops.reference import REFERENCE
from anychip.plugin_api import PlatformContext, ProbeResult, Unsupported
from anychip_rocm import MANIFEST
from anychip_rocm import probe as probing
from anychip_rocm.platform import RocmPlatform


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A CPU's node, which has no target, and two devices, of which the second is numbered with two digits."""
    for node, target in ((0, 0), (2, 90402), (10, 110000)):
        (tmp_path / str(node)).mkdir()
        properties = f"cpu_cores_count 8\ngfx_target_version {target}\nunique_id {0xABC0 + node}\n"
        (tmp_path / str(node) / "properties").write_text(properties)
    monkeypatch.setattr(probing, "_DRIVER", tmp_path)
    monkeypatch.setattr(probing, "_NODES", tmp_path)
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_the_probe_lists_what_the_driver_has(driver):
    assert [(device.index, device.name) for device in probing.probe().devices] == [(0, "gfx942"), (1, "gfx1100")]


def test_the_probe_counts_as_the_runtime_does(driver, monkeypatch):
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert [(device.index, device.name) for device in probing.probe().devices] == [(0, "gfx1100")]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "7")
    hidden = probing.probe()
    assert not hidden.devices and "HIP_VISIBLE_DEVICES" in hidden.reason and hidden.remedy
    assert hidden.reason.endswith("hides all 2 devices")


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["gfx1100"]),
        ({"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, ["gfx942"]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": ""}, ["gfx942", "gfx1100"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-000000000000abca"}, ["gfx1100"]),
        ({"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "1"}, ["gfx942"]),
    ],
)
def test_the_runtimes_variables_count_one_after_the_other(driver, monkeypatch, variables, names):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [device.name for device in probing.probe().devices] == names


def test_without_a_driver_there_is_a_reason_and_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(probing, "_DRIVER", tmp_path / "kfd")
    result = probing.probe()
    assert not result.devices and "no AMD compute driver" in result.reason and "install" in result.remedy


@pytest.mark.skipif(torch.version.hip is not None, reason="this torch is built for ROCm")
def test_a_torch_without_hip_is_refused_by_name():
    context = PlatformContext(
        manifest=MANIFEST, device_indexes=(0,), options=MANIFEST.options(), probe=ProbeResult(), reference=REFERENCE
    )
    with pytest.raises(Unsupported, match="is not built for ROCm; install torch's ROCm build"):
        RocmPlatform(context)


def test_announcing_the_platform_imports_no_runtime():
    program = (
        "import sys, anychip_rocm, anychip_rocm.probe; print([m for m in ('torch', 'triton') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
