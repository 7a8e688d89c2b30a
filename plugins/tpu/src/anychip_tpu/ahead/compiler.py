"""StableHLO text to an executable for a slice of TPUs, and what the compiler says of it. Nothing runs."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from anychip_tpu.ahead.modules import with_donations
from anychip_tpu.ahead.topology import Topology
from anychip_tpu.pallas.generations import GIB

_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
                "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_COLLECTIVE = re.compile(
    r"= (?P<shape>\(?[a-z0-9]+\[[^=]*?) (?P<op>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


class CompileFailed(Exception):
    """The compiler's reason, one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """All of one device."""

    seconds: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the outputs, written over arguments
    temporary_bytes: int
    code_bytes: int
    flops: float
    collective_bytes: int  # results of collectives
    num_kernels: int  # calls of Pallas kernels

    @property
    def hbm_bytes(self) -> int:
        """At the largest moment of the step."""
        unshared = self.output_bytes - self.alias_bytes
        return self.argument_bytes + unshared + self.temporary_bytes + self.code_bytes


def compile_text(text: str, topology: Topology, donated: Mapping[int, int]) -> Compiled:
    """`text`: a module whose arguments' shardings are written on them, for topology.num_devices devices. `donated`:
    arguments by the output that may take their memory. Raises CompileFailed; Unsupported for an unknown slice."""
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir
    from jaxlib import _jax

    devices, count = topology.devices, topology.num_devices
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=count, device_assignment=np.arange(count).reshape(1, count)
    )
    build = options.executable_build_options
    build.use_spmd_partitioning = count > 1
    build.use_shardy_partitioner = False
    build.allow_spmd_sharding_propagation_to_output = [True]
    build.allow_spmd_sharding_propagation_to_parameters = [True]
    with mlir.make_ir_context():
        module = ir.Module.parse(with_donations(text, donated))
        given = module if _takes_modules() else mlir.module_to_bytecode(module)
        start = time.perf_counter()
        try:
            built = devices[0].client.compile(given, _jax.DeviceList(tuple(devices)), options)
        except Exception as error:  # jaxlib's own type, which moved between versions
            raise CompileFailed(reason_of(str(error))) from error
    memory, cost = built.get_compiled_memory_stats(), built.cost_analysis()
    optimized = built.hlo_modules()[0].to_string()
    return Compiled(
        seconds=time.perf_counter() - start,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=max(0.0, cost.get("flops", 0.0)),
        collective_bytes=collective_bytes(optimized),
        num_kernels=optimized.count('custom_call_target="tpu_custom_call"'),
    )


def collective_bytes(optimized: str) -> int:
    """Of the results of collectives in an optimized HLO text. Loops of a step program have none."""
    total = 0
    for match in _COLLECTIVE.finditer(optimized):
        shapes = re.findall(r"([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]", match["shape"])
        sizes = [_DTYPE_BYTES.get(dtype, 4) * _product(dims) for dtype, dims in shapes]
        # An asynchronous start names its operands too.
        total += max(sizes, default=0) if "-start(" in match[0] else sum(sizes)
    return total


def _product(dims: str) -> int:
    result = 1
    for dim in filter(None, dims.split(",")):
        result *= int(dim)
    return result


def reason_of(message: str) -> str:
    """The compiler's reason in one line, with its numbers."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in lines:
        if match := re.search(r"(Ran out of memory.*|Used [\d.]+\w? of [\d.]+\w? (?:hbm|vmem).*)", line):
            return match[1]
    return lines[0] if lines else "the compiler gave no reason"


def _takes_modules() -> bool:
    """jaxlib took bytecode alone before 0.8."""
    import jaxlib

    return tuple(map(int, jaxlib.__version__.split(".")[:2])) >= (0, 8)


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB"
