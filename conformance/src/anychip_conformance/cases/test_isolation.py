"""Isolation: a plugin announces itself without its device, its driver or torch, and patches nothing."""

from __future__ import annotations

import subprocess
import sys

from anychip.plugin_api import PlatformManifest
from anychip.registry.devices import probe


def _in_new_process(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hook_module_imports_without_torch(manifest: PlatformManifest) -> None:
    module = manifest.probe.partition(":")[0]
    loaded = _in_new_process(f"import sys, {module.rpartition('.')[0] or module}; print('torch' in sys.modules)")
    assert loaded == "False", f"importing {manifest.package}'s hook module loads torch"


def test_probe_answers_without_raising(manifest: PlatformManifest) -> None:
    result = probe(manifest)
    assert "raised" not in result.reason
    assert result.devices or (result.reason and result.remedy)


def test_platform_module_imports_without_the_device(manifest: PlatformManifest) -> None:
    module, _, name = manifest.platform.partition(":")
    assert _in_new_process(f"import {module}; print({module}.{name}.__name__)") == name


def test_loading_the_platform_patches_nothing_of_core(manifest: PlatformManifest) -> None:
    module = manifest.platform.partition(":")[0]
    program = f"""
import anychip.plugin_api as api, anychip.ops.reference as reference
def snapshot():
    found = {{}}
    for owner in (api, reference, reference.functional, reference.sampling):
        for key, value in vars(owner).items():
            found[owner.__name__, key] = id(value)
            if isinstance(value, type):
                found.update({{(key, k): id(v) for k, v in vars(value).items()}})
    return found
before = snapshot()
import {module}
after = snapshot()
print(sorted(str(k) for k in before if before[k] != after.get(k)))
"""
    assert _in_new_process(program) == "[]"
