"""Isolation: a plugin announces itself without its device, its driver or torch, patches nothing, and does not fall back
to the host in silence."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import torch

from anychip.plugin_api import Platform
from anychip.registry.devices import probe
from anychip_conformance.batch import Row
from anychip_conformance.case import Nothing, kind
from anychip_conformance.cases.test_linear import LinearCase
from anychip_conformance.cases.test_moe import MoECase
from anychip_conformance.cases.test_sampling import SampleCase
from anychip_conformance.choices import resolved, widest
from anychip_conformance.device import Device
from anychip_conformance.host_watch import HostWatch
from anychip_conformance.paged import AttentionCase
from anychip_conformance.row_calls import OP_CALLS, Maker, OpCalls, OpSizes, RowCall
from anychip_conformance.row_calls_caches import paged_call
from anychip_conformance.row_calls_products import draw_call, experts_call, linear_call

_TIMEOUT_S = 120


def in_new_process(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@kind("isolation.hook_import", needs_device=False)
def hook_import(device: Device, case: Nothing) -> None:
    """The hook module loads without torch: `anychip devices` explains a device on machines that have nothing."""
    module = device.manifest.probe.partition(":")[0].partition(".")[0]
    loaded = in_new_process(f"import sys, {module}; print('torch' in sys.modules)")
    assert loaded == "False", f"importing {module} loads torch"


@kind("isolation.probe", needs_device=False)
def probe_answers(device: Device, case: Nothing) -> None:
    """A probe never raises, and gives a reason and a remedy where it finds nothing."""
    result = probe(device.manifest)
    assert "its probe raised" not in result.reason, result.reason
    assert result.devices or (result.reason and result.remedy), "no devices, and no reason or no remedy"


@kind("isolation.platform_import", needs_device=False)
def platform_import(device: Device, case: Nothing) -> None:
    """The platform's module imports on a machine without the device."""
    module, _, name = device.manifest.platform.partition(":")
    assert in_new_process(f"import {module}; print({module}.{name}.__name__)") == name


PATCH_PROGRAM = """
import importlib, sys
import torch, torch.nn.functional, anychip.plugin_api, anychip.ops.reference, anychip.worker.worker, anychip.launch.llm
for name in {runtime_imports!r}:
    importlib.import_module(name)
package = {package!r}
def snapshot():
    found = {{}}
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] not in ("anychip", "torch"):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                found.update({{(name, key, k): v for k, v in vars(value).items()}})
    return found
def blamed(key, value):
    if key[0].partition(".")[0] == "anychip":
        return True
    origin = getattr(value, "__module__", "") or ""
    return origin.partition(".")[0] == package
before = snapshot()
importlib.import_module({module!r})
opened = {opened}
after = snapshot()
changed = [".".join(k) for k, v in after.items() if k in before and before[k] is not v and blamed(k, v)]
added = [".".join(k) for k, v in after.items() if k not in before and k[0] in {{b[0] for b in before}} and blamed(k, v)
         and (getattr(v, "__module__", "") or "").partition(".")[0] == package]
print(sorted(changed + added))
"""


@kind("isolation.patches")
def patches(device: Device, case: Nothing) -> None:
    """Loading and opening the platform changes no attribute of core, and none of torch that its own package defines;
    what the vendor's runtime does to torch when it is imported is not blamed on the plugin."""
    module = device.manifest.platform.partition(":")[0]
    opened = (
        f"importlib.import_module('anychip_conformance.device').open_device({device.name!r}, {dict(device.options)!r})"
    )
    program = PATCH_PROGRAM.format(
        runtime_imports=list(device.manifest.runtime_imports),
        module=module,
        package=module.partition(".")[0],
        opened=opened,
    )
    found = in_new_process(program)
    assert found == "[]", f"patched: {found}"


@kind("isolation.device")
def placed_on_the_device(device: Device, case: Nothing) -> None:
    """Tensors live on the device that the probe found: hardware other than the host is not torch's cpu."""
    platform = device.platform
    name = torch.device(platform.default_device)
    if device.probe.devices[0].backing == "hardware":
        assert name.type != "cpu", (
            f"the probe found hardware, {device.probe.devices[0].name}, and the platform computes on torch's cpu; a "
            "runtime on the host says so with DeviceInfo(backing=...)"
        )
    for what, tensor, place in (
        ("allocate", platform.allocate(64, "kv"), name),
        ("empty", platform.empty((4, 4), "float32", "kv"), name),
        ("empty for weights", platform.empty((4, 4), "float32", "weights"), torch.device(platform.weights_device)),
    ):
        assert tensor.device.type == place.type, f"{what} gives a tensor on {tensor.device}, not on {place}"


class WatchedCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An op, or a part of a layer."""

    call: str


def _watched(device: Device, name: str) -> RowCall:
    """Large enough that its results are no bookkeeping."""
    sizes = OpSizes(rows=64, width=256, dtype=widest(device.capabilities))
    parts: dict[str, Maker] = {
        "linear": lambda: linear_call(device, resolved(LinearCase(tokens=64, columns=256, rows=(64,)), device)),
        "experts": lambda: experts_call(device, resolved(MoECase(tokens=64, hidden=64), device)),
        "draw": lambda: draw_call(device, SampleCase(rows=16, vocab=512, temperature=(1.0, 0.0))),
        "attention": lambda: paged_call(device, resolved(AttentionCase(rows=(Row(0, 0, 40),), head_dim=64), device)),
    }
    return parts[name]() if name in parts else OpCalls(device, sizes).make(name)


@kind(
    "isolation.no_fallback",
    corpus=[WatchedCase(call=call) for call in (*OP_CALLS, "linear", "experts", "draw", "attention")],
)
def no_fallback(device: Device, case: WatchedCase) -> None:
    """While kernels run, nothing but small bookkeeping is computed on the host, unless the host is the device."""
    call = _watched(device, case.call)
    call.run(call.inputs)  # what a plugin prepares when an op is first used is no fallback
    watch = HostWatch(torch.device(device.platform.default_device).type)
    with watch:
        call.run(call.inputs)
    assert not watch.found, f"{case.call} is computed on the host: {', '.join(sorted(watch.found))}"


@kind("isolation.capabilities")
def capabilities_are_whole(device: Device, case: Nothing) -> None:
    """What is declared fits together: a dtype to compute in, block sizes that layouts offer, positive limits; and
    only a simulation is too slow for the sizes of real models."""
    caps, rules = device.capabilities, device.platform.step_rules
    assert isinstance(device.platform, Platform)
    assert caps.dtypes & {"float32", "bfloat16", "float16"}, f"no dtype to compute in among {sorted(caps.dtypes)}"
    assert caps.block_sizes and all(size > 0 for size in caps.block_sizes)
    assert caps.max_slots is None or caps.max_slots >= max(caps.block_sizes), "not one block fits max_slots"
    assert rules.chunk_multiple >= 1
    shown = device.probe.devices[0]
    assert shown.reach is None or shown.backing == "simulated", f"reach is for simulations, and this is {shown.backing}"
    for limit in (rules.max_tokens, rules.max_rows, rules.max_prefills, rules.max_padded_tokens):
        assert limit is None or limit > 0
