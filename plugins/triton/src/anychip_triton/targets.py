"""The GPUs that kernels are compiled for, and what decides a tile's size there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`num_cores` is the compute units of a usual part: how many programs keep it busy. `fp8`: the kind of
    float8_e4m3 that its matrix instructions take; gfx942's "fnuz" has another bias than checkpoints' "fn"."""

    name: str
    backend: Literal["cuda", "hip", "interpreter"]
    arch: int | str
    warp_size: int
    shared_bytes: int
    """Most shared memory of one program, on the least of the devices that it is for."""
    num_cores: int
    fp8: Literal["", "fn", "fnuz"] = ""
    page: int = 16
    """Tokens of a KV block where nobody asks for another size. A tile of keys in one block is read without a look at
    the block table for each key."""
    chains: bool = False
    """Whether a kernel can begin while the one before it ends (kernels/chain.py)."""
    launch_options: tuple[tuple[str, int], ...] = ()
    """Options of the backend's own for every launch."""


_MFMA = (("matrix_instr_nonkdim", 16), ("waves_per_eu", 1))

TARGETS = {
    target.name: target
    for target in (
        Target(name="sm_80", backend="cuda", arch=80, warp_size=32, shared_bytes=101376, num_cores=108),
        Target(
            name="sm_90", backend="cuda", arch=90, warp_size=32, shared_bytes=232448, num_cores=132, fp8="fn",
            page=64, chains=True,
        ),
        Target(
            name="sm_100", backend="cuda", arch=100, warp_size=32, shared_bytes=232448, num_cores=148, fp8="fn",
            page=64, chains=True,
        ),
        Target(
            name="gfx90a", backend="hip", arch="gfx90a", warp_size=64, shared_bytes=65536, num_cores=104,
            launch_options=_MFMA,
        ),
        Target(
            name="gfx942", backend="hip", arch="gfx942", warp_size=64, shared_bytes=65536, num_cores=304, fp8="fnuz",
            launch_options=_MFMA,
        ),
        Target(
            name="gfx950", backend="hip", arch="gfx950", warp_size=64, shared_bytes=163840, num_cores=256, fp8="fn",
            launch_options=_MFMA,
        ),
        Target(name="gfx1100", backend="hip", arch="gfx1100", warp_size=32, shared_bytes=65536, num_cores=96),
    )
}  # fmt: skip
"""Shared memory from the vendors' programming guides: CUDA C++ Programming Guide, table of technical specifications;
AMD Instinct and RDNA 3 ISA guides."""

INTERPRETER = Target(name="interpreter", backend="interpreter", arch=0, warp_size=1, shared_bytes=1 << 40, num_cores=8)
"""Triton's interpreter, on the host."""


def cuda_target(major: int, minor: int) -> Target | None:
    """The target whose tiles fit a compute capability: that of its major number, or sm_80. Capability 12 has neither
    the instructions of 9 and 10 nor their shared memory, but what 8.6 has."""
    if major < 8:
        return None
    return TARGETS.get(f"sm_{major}0", TARGETS["sm_80"])


def hip_target(gfx: str) -> Target | None:
    """The target of a gfx name such as gfx942:sramecc+:xnack-."""
    target = TARGETS.get(gfx.partition(":")[0])
    return target if target is not None and target.backend == "hip" else None
