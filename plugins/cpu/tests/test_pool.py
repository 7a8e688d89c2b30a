"""The kernels' threads: every piece runs once, late threads are not waited for, results do not depend on threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anychip.plugin_api import LinearPart, LinearSpec, QuantScheme
from anychip_cpu import native

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "src/anychip_cpu/kernels"
BUILDS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("build", ["plain", *(pytest.param(b, marks=pytest.mark.full) for b in ("address", "thread"))])
def test_regions_are_whole_under_stress(tmp_path, build):
    program = tmp_path / "pool_stress"
    sources = [TESTS / "pool_stress.cpp", KERNELS / "pool.cpp"]
    subprocess.run(
        ["g++", "-std=c++17", "-pthread", *BUILDS[build], f"-I{KERNELS}", *sources, "-o", program], check=True
    )
    # Addresses at random leave the thread sanitizer of older compilers no room.
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), program]
    for seed in range(1 if build == "plain" else 4):
        ended = subprocess.run([*command, str(seed), "1500"], capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, f"seed {seed}: {ended.stdout}{ended.stderr}"


def on_threads(threads: int, cores: set[int], run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """run() with so many threads of the kernels, all kept to some cores. The process's own stay where they are."""
    results: list[torch.Tensor] = []
    kernels = native.load("")
    assert kernels is not None

    def bound() -> None:
        os.sched_setaffinity(0, cores)  # of this thread, and of those that it starts
        kernels.set_threads(threads)
        results.append(run())
        kernels.set_threads(threads + 1)  # so that the next ones are new
        run()

    thread = threading.Thread(target=bound)
    thread.start()
    thread.join()
    kernels.set_threads(1)
    return results[0]


@pytest.mark.skipif(not native.usable() or not hasattr(os, "sched_setaffinity"), reason="no kernels, or no affinity")
@pytest.mark.parametrize("scheme", [None, QuantScheme(values="int8", scales="channel")], ids=["plain", "int8"])
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 512, 3000), (7, 96, 130), (300, 2500, 200)])
def test_results_do_not_depend_on_threads(open_cpu, scheme, rows, columns, outputs):
    """Bit by bit, with more threads than cores too: a piece has the same bounds whoever runs it."""
    spec = LinearSpec(
        in_features=columns, out_features=outputs, dtype="bfloat16",
        parts=(LinearPart(name="all", offset=0, rows=outputs),), scheme=scheme,
    )  # fmt: skip
    kernel = open_cpu("", 1).linear(spec)
    packed = kernel.begin()
    draw = torch.Generator().manual_seed(rows)
    values = torch.randint(-127, 128, (outputs, columns), generator=draw, dtype=torch.int8)
    kernel.load(packed, "all", values if scheme else values.bfloat16() / 64)
    if scheme:
        kernel.load(packed, "all.scale", torch.rand(outputs, generator=draw) / 64 + 0.01)
    packed = kernel.finish(packed)
    x = torch.randn(rows, columns, generator=draw).bfloat16()
    every, one = os.sched_getaffinity(0), {next(iter(os.sched_getaffinity(0)))}
    alone = on_threads(1, one, lambda: kernel.apply(x, packed).clone())
    assert alone.isfinite().all()
    for threads, cores in ((4, one), (4, every), (2, every)):
        assert all(on_threads(threads, cores, lambda: kernel.apply(x, packed).clone()).equal(alone) for _ in range(3))
