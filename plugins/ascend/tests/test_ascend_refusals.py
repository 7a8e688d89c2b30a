"""The program where there is no device, no CANN, or another torch's torch_npu: an exit status and words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from anychip.errors import ConfigError
from anychip.registry import requirements
from anychip_ascend import MANIFEST
from anychip_ascend.options import AscendOptions, worker_env


def test_serve_ends_with_words_and_without_a_traceback():
    code = "import sys; from anychip.entrypoints.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "quickstart", "--device", "ascend"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert "device 'ascend' cannot start" in said and "requires CANN >=8.5: not found" in said
    assert "/dev/davinci*" in said


def test_the_manifest_is_light_and_names_what_the_vendor_changes():
    code = (
        "import sys, anychip.plugin_api\n"
        "import anychip_ascend, anychip_ascend.probe\n"
        "anychip_ascend.probe.probe()\n"
        "print([name for name in ('torch', 'torch_npu') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert MANIFEST.runtime_imports == ("torch_npu",) and not MANIFEST.auto_select


def test_a_torch_npu_of_another_torch_is_named_with_both_versions(monkeypatch):
    installed = {"torch": "2.13.0", "torch_npu": "2.10.0.post4"}
    monkeypatch.setattr(requirements, "version", installed.__getitem__)
    checked = {r.requirement.name: r for r in requirements.check_requirements(MANIFEST.requirements)}
    assert checked["torch"].met and not checked["torch_npu"].met
    assert "found 2.10.0.post4" in checked["torch_npu"].describe() and ">=2.13,<2.14" in checked["torch_npu"].describe()


def test_a_cann_that_is_too_old_is_named_with_what_was_found(monkeypatch):
    monkeypatch.setattr("anychip_ascend.toolkit.cann_version", lambda: "8.2")
    (found,) = (r for r in requirements.check_requirements(MANIFEST.requirements) if r.requirement.name == "CANN")
    assert not found.met and "found 8.2" in found.describe() and "set_env.sh" in found.describe()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("graphs", "some", "full, pieces, off"), ("attention", "flash", "fused, plain"), ("nz", "maybe", "true or false"),
     ("hccl_buffer_mib", "0", "1 to 4096"), ("hugepages", "1", "no such option")],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_with_the_choices(option, value, said):
    with pytest.raises(ConfigError, match=said):
        AscendOptions.parse("anychip-ascend", {option: value})


def test_workers_do_not_import_the_runtime_within_torchs_import(monkeypatch):
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    assert worker_env(None, None) == {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert worker_env(None, None) == {}
