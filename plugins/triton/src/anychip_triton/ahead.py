"""Compiles every launch for a target, without a device or a driver, and reads from the machine code what it uses.

The launches are those of the backends themselves, which run on tensors without storage and tell a recorder instead of
a device: what is compiled here is what will be launched there.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from anychip_triton.launch import Grid, chained
from anychip_triton.targets import Target
from anychip_triton.tiles import TileTable, shipped_table

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64", torch.float64: "*fp64",
}  # fmt: skip
_ALIGNED = 16
_MATRIX_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_|v_smfmac_|v_wmma_)[\w.:]*")


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as it would be launched."""

    kernel: Any
    options: Mapping[str, Any]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name, and the constants that it is compiled for."""
        return f"{self.kernel.__name__}({', '.join(f'{n}={self.arguments[n]}' for n in self.constants)})"

    @property
    def constants(self) -> list[str]:
        return [parameter.name for parameter in self.kernel.params if parameter.is_constexpr]


class RecordingLauncher:
    """launch.Launcher that launches nothing."""

    def __init__(self, target: Target, tiles: TileTable | None = None) -> None:
        self.target = target
        self.tiles = tiles if tiles is not None else shipped_table(target.name)
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any, grid: Grid, options: dict[str, int], **arguments: Any) -> None:
        more, chaining = chained(self.target, kernel)
        self.launches.append(Launch(kernel, options | chaining, arguments | more))


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """What a compiled kernel uses. `spills` counts 32-bit registers of a thread that are kept in memory."""

    name: str
    target: str
    shared_bytes: int
    spills: int
    registers: int
    matrix_instructions: Counter[str] = field(default_factory=Counter)
    binary: bytes = b""


def compile_launch(launch: Launch, target: Target) -> MachineCode:
    """Raises what the compiler raises."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _kind(value)
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % _ALIGNED == 0 and value)
        if aligned and not launch.kernel.params[index].do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", _ALIGNED]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {**launch.options, **dict(target.launch_options)}
    made = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)
    hip = target.backend == "hip"
    text, binary = made.asm["amdgcn" if hip else "ptx"], made.asm["hsaco" if hip else "cubin"]
    registers, spills = _amd_registers(text) if hip else _nvidia_registers(binary)
    return MachineCode(
        name=launch.name,
        target=target.name,
        shared_bytes=made.metadata.shared,
        spills=spills,
        registers=registers,
        matrix_instructions=Counter(_MATRIX_INSTRUCTION.findall(text)),
        binary=binary,
    )


def _amd_registers(assembly: str) -> tuple[int, int]:
    """Vector registers of a thread, and how many are spilled: the kernel's metadata has both."""
    used, spilled = (re.search(rf"\.{name}:\s*(\d+)", assembly) for name in ("vgpr_count", "vgpr_spill_count"))
    assert used and spilled, "the assembly has no metadata of its registers"
    return int(used.group(1)), int(spilled.group(1))


def _nvidia_registers(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and how many its stack holds: a kernel without calls has one for spills alone."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert usage, f"cuobjdump tells no registers: {told}"
    return int(usage.group(1)), int(usage.group(2)) // 4


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


def all_launches(target: Target, tiles: TileTable | None = None) -> Iterator[Launch]:
    """Everything that models of usual shapes launch on a target, without repetitions."""
    from anychip_triton.problems import PROBLEMS

    seen = set()
    for problem in PROBLEMS:
        recorder = RecordingLauncher(target, tiles)
        problem(recorder)
        for launch in recorder.launches:
            types = tuple(_kind(value) for value in launch.arguments.values())
            key = (launch.name, tuple(sorted(launch.options.items())), types)
            if key not in seen:
                seen.add(key)
                yield launch
