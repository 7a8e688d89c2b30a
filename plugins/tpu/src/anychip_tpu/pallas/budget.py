"""What a kernel needs of a core's memories, and its refusal where that is more than a core has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from anychip.plugin_api import Unsupported
from anychip_tpu.pallas.generations import MIB, Generation

LANES = 128
SUBLANES = 8
COMPILER_SHARE = 0.2
"""Of VMEM, left to the compiler for values that a kernel holds between its loads and its stores."""


def sublane_rows(itemsize: float) -> int:
    """Rows of a tile whose elements have `itemsize` bytes: 8 of 32 bits, 16 of 16, 32 of 8."""
    return int(SUBLANES * 4 / itemsize)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Buffer:
    """An array in VMEM. `copies` is 2 where the pipeline holds the next block already."""

    name: str
    shape: tuple[int, ...]
    itemsize: float
    copies: int = 1

    @property
    def num_bytes(self) -> int:
        """With the padding of its last two dimensions to whole tiles."""
        *outer, rows, lanes = (1, *self.shape) if len(self.shape) == 1 else self.shape
        tile = round_up(rows, sublane_rows(self.itemsize)) * round_up(lanes, LANES)
        return int(math.prod(outer) * tile * self.itemsize) * self.copies


def check_vmem(kernel: str, buffers: Iterable[Buffer], chip: Generation, remedy: str) -> int:
    """Bytes to ask the compiler for. Raises Unsupported with numbers if a core has less."""
    held = list(buffers)
    need = sum(buffer.num_bytes for buffer in held)
    usable = int(chip.vmem_bytes * (1 - COMPILER_SHARE))
    if need > usable:
        largest = max(held, key=lambda buffer: buffer.num_bytes)
        raise Unsupported(
            f"anychip-tpu {kernel}",
            [
                f"it needs {need / MIB:.1f} MiB of VMEM, a core of {chip.name} has {chip.vmem_bytes / MIB:.0f} MiB, of "
                f"which kernels may use {usable / MIB:.1f}; the largest buffer is {largest.name} "
                f"{list(largest.shape)} with {largest.num_bytes / MIB:.1f} MiB; {remedy}"
            ],
        )
    return min(chip.vmem_bytes, need + int(chip.vmem_bytes * COMPILER_SHARE))


def check_smem(kernel: str, num_words: int, chip: Generation, remedy: str) -> None:
    """Scalars that a kernel reads before its steps. Raises Unsupported with numbers if SMEM is smaller."""
    need, usable = num_words * 4, int(chip.smem_bytes * (1 - COMPILER_SHARE))
    if need > usable:
        raise Unsupported(
            f"anychip-tpu {kernel}",
            [
                f"its scalars need {need / 1024:.0f} KiB of SMEM, a core of {chip.name} has "
                f"{chip.smem_bytes / 1024:.0f} KiB, of which kernels may use {usable / 1024:.0f}; {remedy}"
            ],
        )
