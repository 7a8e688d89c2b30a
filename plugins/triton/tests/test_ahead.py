"""Kernels compiled for real targets, without a device: matrix instructions, spills and shared memory in the machine
code. What the backends would launch is what is compiled."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from anychip_triton.ahead import Launch, MachineCode, RecordingLauncher, all_launches, compile_launch
from anychip_triton.problems import SAMPLE
from anychip_triton.targets import TARGETS, Target

PRODUCTS = ("matmul", "expert_matmul", "paged_attention")
SAMPLED_TARGETS = ("sm_90", "gfx942")
PRODUCTS_ALONE = ("sm_80", "gfx1100")
"""Targets with matrix instructions of their own, for which one launch of each product is compiled."""

STRAY_SPILLS = 2
"""ptxas keeps a uniform register for a branch in memory here and there, where vector registers are to be had."""

CAPPED_SPILLS = 8
"""Where a table caps registers, so that more programs share a core: it was measured to be faster, spills and all."""

WARP_GROUP_ROWS = 64
"""Rows that a warp group's product on sm_90 has at least."""


def matrix_instructions(launch: Launch, target: Target) -> set[str]:
    """Those of which a product must have one. float32 is multiplied as float32, without."""
    if launch.kernel.__name__ not in PRODUCTS or launch.arguments["out"].dtype == torch.float32:
        return set()
    if target.backend == "hip":
        return {"v_mfma_"} if target.warp_size == 64 else {"v_wmma_"}
    large = launch.arguments["BLOCK_M"] >= WARP_GROUP_ROWS
    if target.name == "sm_90" and large:
        return {"wgmma.mma_async"}
    return {"mma.sync", "wgmma.mma_async", "tcgen05.mma"}


def takes_fp8(launch: Launch, target: Target) -> bool:
    """NVIDIA's products of few rows are of mma.sync, for which Triton widens 8-bit floats."""
    return target.backend == "hip" or launch.arguments["BLOCK_M"] >= WARP_GROUP_ROWS


def judge(launch: Launch, code: MachineCode, target: Target) -> None:
    wanted = matrix_instructions(launch, target)
    used = [name for name in code.matrix_instructions if name.startswith(tuple(wanted))]
    assert used or not wanted, f"{code.name}: none of {wanted} in its machine code"
    if launch.arguments.get("X_KIND") == "fp8" and launch.arguments["FP8"] and takes_fp8(launch, target):
        assert all(re.search("fp8|e4m3|f8f6f4", name) for name in used), f"{code.name} widens 8-bit floats: {used}"
    allowed = STRAY_SPILLS if target.backend == "cuda" else 0
    if "maxnreg" in launch.options:
        allowed = CAPPED_SPILLS
    assert code.spills <= allowed, f"{code.name} on {target.name} spills {code.spills} registers"
    assert code.shared_bytes <= target.shared_bytes, f"{code.name}: {code.shared_bytes} bytes of shared memory"
    assert code.binary.startswith(b"\x7fELF")


def sampled(target: Target) -> list[Launch]:
    recorder = RecordingLauncher(target)
    for problem in SAMPLE:
        problem(recorder)
    return recorder.launches


@pytest.mark.parametrize("target", SAMPLED_TARGETS)
def test_a_sample_compiles_without_spills(target):
    launches = sampled(TARGETS[target])
    kernels = {launch.kernel.__name__ for launch in launches}
    assert set(PRODUCTS) < kernels and len(kernels) >= 11
    for launch in launches:
        judge(launch, compile_launch(launch, TARGETS[target]), TARGETS[target])


@pytest.mark.parametrize("target", PRODUCTS_ALONE)
def test_one_launch_of_each_product_compiles_without_spills(target):
    first = {launch.kernel.__name__: launch for launch in reversed(sampled(TARGETS[target]))}
    for product in PRODUCTS:
        judge(first[product], compile_launch(first[product], TARGETS[target]), TARGETS[target])


@pytest.mark.full
@pytest.mark.parametrize("arch", [86, 89, 120])
def test_tiles_of_sm_80_fit_the_devices_that_take_them_too(arch):
    target = replace(TARGETS["sm_80"], arch=arch)
    for launch in sampled(target):
        code = compile_launch(launch, target)
        assert code.shared_bytes <= target.shared_bytes and code.spills <= 16, code.name


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_everything_compiles_without_spills(target):
    launches = list(all_launches(TARGETS[target]))
    assert len(launches) > 80
    for launch in launches:
        judge(launch, compile_launch(launch, TARGETS[target]), TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
def test_the_shipped_table_has_a_tile_for_every_launch(target):
    for launch in all_launches(TARGETS[target]):
        assert launch.options["num_warps"] in (1, 2, 4, 8, 16)
        for name in launch.constants:
            if name.startswith("BLOCK_") and name != "BLOCK_Q":
                size, least = launch.arguments[name], 1 if name == "BLOCK_H" else 16  # no product has heads as a side
                assert size & (size - 1) == 0 and size >= least, f"{launch.name}: {name} is {size}"
