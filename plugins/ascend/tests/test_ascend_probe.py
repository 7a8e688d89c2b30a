"""What is found of devices and CANN, over a made-up /dev and made-up files of CANN's: no device, no torch_npu."""

from __future__ import annotations

import subprocess

import pytest
from packaging.specifiers import SpecifierSet

from anychip_ascend import CANN, MANIFEST
from anychip_ascend import probe as probing
from anychip_ascend.toolkit import cann_version

A2 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 91.7        44                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3395 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | Alarm         | 93.1        46                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3394 / 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
"""
A3 = """\
| 0     Ascend910           | OK            | 163.6       38                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3130 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           37                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          2884 / 65536         |
"""
DUO = """\
| 1       310P3             | OK            | NA          43                0     / 0            |
| 0       0                 | 0000:01:00.0  | 0           1852 / 21527                           |
"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A /dev of so many devices, and an npu-smi that prints `smi`."""

    def build(count: int, smi: str = "", *, visible: str | None = None) -> None:
        (tmp_path / "davinci_manager").touch()
        for index in range(count):
            (tmp_path / f"davinci{index}").touch()
        monkeypatch.setattr(probing, "_DEV", tmp_path)
        monkeypatch.setattr(probing, "_npu_smi", lambda: smi)
        if visible is None:
            monkeypatch.delenv(probing.VISIBLE, raising=False)
        else:
            monkeypatch.setenv(probing.VISIBLE, visible)

    return build


def test_without_device_files_the_reason_and_the_remedy_are_given(machine):
    machine(0)
    result = probing.probe()
    assert not result.devices and "/dev/davinci*" in result.reason and "hisi_hdc" in result.remedy


def test_npu_smi_gives_names_memory_generation_and_health(machine):
    machine(2, A2)
    first, second = probing.probe().devices
    assert (first.index, first.name, first.total_memory) == (0, "Ascend 910B3", 65536 << 20)
    assert first.detail == "generation 910B" and "health Alarm" in second.detail


@pytest.mark.parametrize(("text", "count", "generation"), [(A3, 2, "910C"), (DUO, 1, "310P")])
def test_packages_of_two_devices_and_devices_without_hbm_are_read(machine, text, count, generation):
    machine(count, text)
    devices = probing.probe().devices
    assert len(devices) == count and all(f"generation {generation}" in device.detail for device in devices)
    assert all(device.total_memory for device in devices)


def test_device_files_stand_for_what_npu_smi_does_not_list(machine):
    machine(11)
    devices = probing.probe().devices
    assert [device.name for device in devices[-2:]] == ["NPU davinci9", "NPU davinci10"]
    assert devices[0].total_memory is None


@pytest.mark.parametrize(
    ("setting", "count", "chosen"),
    [(None, 3, [0, 1, 2]), ("2,0", 3, [2, 0]), ("0-1", 3, [0, 1]), ("1,7,2", 3, [1]), ("1,1", 3, [1]), ("", 3, []),
     ("x", 3, []), ("2-1", 3, [])],
)  # fmt: skip
def test_the_variable_leaves_devices_up_to_the_first_that_is_not_there(setting, count, chosen):
    assert probing.visible(setting, count) == chosen


def test_chosen_devices_are_numbered_as_the_runtime_does(machine):
    machine(2, A2, visible="1")
    (device,) = probing.probe().devices
    assert device.index == 0 and "Alarm" in device.detail


def test_a_variable_that_hides_all_devices_is_named(machine):
    machine(2, A2, visible="5")
    result = probing.probe()
    assert not result.devices and "hides all 2" in result.reason and "0 to 1" in result.remedy


def test_an_npu_smi_that_hangs_or_fails_is_as_none(monkeypatch):
    def hangs(*_, **__):
        raise subprocess.TimeoutExpired("npu-smi", 10)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert probing._npu_smi() == ""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 3, "half a table"))
    assert probing._npu_smi() == ""


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("version.cfg", "# of all\ntoolkit_running_version=[8.5.0.alpha003:8.5.0]\n", "8.5.0"),
        ("opp/version.info", "Version=9.1.0\nversion_dir=opp\n", "9.1.0"),
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\n", "8.2"),
    ],
)
def test_canns_version_is_read_from_its_own_files(tmp_path, name, text, version):
    path = tmp_path / "ascend-toolkit/latest" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert cann_version({}, tmp_path) == version


def test_the_environment_says_where_cann_is_before_the_default_place(tmp_path):
    for folder, version in (("ascend-toolkit/latest", "8.0.0"), ("own", "9.0.0")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "version.cfg").write_text(f"version={version}")
    assert cann_version({"ASCEND_HOME_PATH": str(tmp_path / "own")}, tmp_path) == "9.0.0"


def test_no_cann_and_files_without_a_version_are_none(tmp_path):
    assert cann_version({}, tmp_path) is None
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "version.cfg").write_text("nothing here")
    assert cann_version({"ASCEND_HOME_PATH": str(tmp_path / "gone")}, tmp_path) is None


def test_the_manifest_wants_a_cann_that_is_new_enough():
    wanted = next(r for r in MANIFEST.requirements if r.name == "CANN")
    assert wanted.range == CANN and SpecifierSet(CANN).contains("8.5.0") and not SpecifierSet(CANN).contains("8.2")
