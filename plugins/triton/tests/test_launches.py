"""What may vary from step to step does not make another form of a kernel; forms are compiled before they run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from anychip_triton.ahead import RecordingLauncher
from anychip_triton.problems import attention, experts, product
from anychip_triton.targets import TARGETS

LAYER = {"heads": 8, "kv_heads": 2, "dim": 64}
STEPS = [
    (lambda launch, n: attention(launch, **LAYER, rows=n, queries=5, context=16 * n), (3, 16, 31)),
    (lambda launch, n: product(launch, rows=n, columns=512, features=256), (1, 7, 16)),
    (lambda launch, n: experts(launch, tokens=n), (40, 100, 128)),
]


@pytest.mark.parametrize(("step", "sizes"), STEPS)
def test_a_steps_sizes_are_not_specialized(step, sizes):
    forms = set()
    for size in sizes:
        recorder = RecordingLauncher(TARGETS["sm_90"])
        step(recorder, size)
        launches = recorder.launches
        forms.add(tuple((each.name, tuple(sorted(each.options.items())), specialized(each)) for each in launches))
    assert len(forms) == 1


@pytest.mark.parametrize(("rows", "launched"), [(1, ["matmul"]), (16, ["matmul"]), (17, ["gated_activation"])])
def test_a_product_of_few_rows_applies_the_activation(rows, launched):
    """Of more, the vendor's library is the product, which no launch of ours is."""
    recorder = RecordingLauncher(TARGETS["sm_90"])
    product(recorder, rows=rows, columns=64, features=96, epilogue="silu")
    assert [launch.kernel.__name__ for launch in recorder.launches] == launched
    assert tuple(recorder.launches[-1].arguments["out"].shape) == (rows, 48)


def specialized(launch):
    """Integers of which Triton's launcher would make a constant or an alignment."""
    return tuple(
        (parameter.name, value == 1, value % 16 == 0)
        for parameter in launch.kernel.params
        if isinstance(value := launch.arguments[parameter.name], int)
        and not parameter.is_constexpr
        and not parameter.do_not_specialize
    )


def test_a_rehearsal_compiles_what_is_called_and_runs_nothing(tmp_path):
    """In a process of its own, with a stand-in for the driver: what is compiled is for the real target."""
    program = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

loaded = []

class Utils:
    get_device_properties = lambda self, device: {"max_shared_mem": 232448}
    load_binary = lambda self, name, *_: loaded.append(name) or (object(), object(), 0, 0, 1024)

class StandIn:
    utils = Utils()
    launcher_cls = lambda self, source, metadata: print
    get_current_device = lambda self: 0
    set_current_device = lambda self, device: None
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    is_active = lambda self: True

driver.set_active(StandIn())
from anychip_triton.kernels import norm, sampling, truncation
from anychip_triton.launch import JitLauncher
from anychip_triton.ops import TritonOps
from anychip_triton.targets import TARGETS
from anychip_triton.tiles import shipped_table

launch = JitLauncher(TARGETS["sm_90"], shipped_table("sm_90"))
ops, x, weight = TritonOps(launch), torch.randn(3, 64), torch.randn(64)
rows = {name: torch.zeros(3, dtype=torch.int32) for name in
        ("top_k", "seed_low", "seed_high", "sample_index", "position")}
rows |= {name: torch.zeros(3) for name in ("temperature", "top_p", "min_p")}
with launch.rehearsal():
    for _ in range(3):
        ops.rms_norm(x=x, weight=weight, eps=1e-6)
    ops.residual_norm_quant(x=x, residual=x, weight=weight, eps=1e-6)
    for all_greedy in (False, True):
        ids = ops.sample(logits=x, all_greedy=all_greedy, **rows)
assert ids.tolist() == [0, 0, 0]
kernels = (norm.rms_norm, sampling.best_of_parts, sampling.weigh_parts, truncation.truncate, sampling.draw)
made = [kernel for each in kernels for kernel in each.device_caches[0][0].values()]
assert all("cubin" in kernel.asm for kernel in made)
assert len(loaded) == len(made)  # each once
print(len(made))
"""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "7", done.stderr
