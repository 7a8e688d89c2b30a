"""The simulated machine, by environment variables: which generation, how many devices, how much of everything.

NPU_SIMULATOR_SOC       name of the chip as the runtime reports it (Ascend910B3)
NPU_SIMULATOR_DEVICES   number of devices (1)
NPU_SIMULATOR_MEMORY    bytes of a device (8 GiB: what is not touched costs the host nothing)
NPU_SIMULATOR_STREAMS   streams of a device; captured graphs hold some of them (1984)
NPU_SIMULATOR_STALE     "allow": a replay with host arguments of the last one is not refused
NPU_SIMULATOR_COUNTS    folder into which each process writes its calls of the vendor's ops: see tally.py
NPU_SIMULATOR_TRACE     1: names on stderr every function of CANN that is called and only answers 0
"""

from __future__ import annotations

import os
from dataclasses import dataclass

GENERATIONS = ("310P", "910B", "910C", "950")
_PREFIXES = {"Ascend310P": "310P", "Ascend910B": "910B", "Ascend910_93": "910C", "Ascend950": "950"}
"""From the vendor's SocVersion (csrc/core/npu/NpuVariables.h)."""
_STREAMS = 1984
"""What vllm-ascend counts on: 2048 less those that the runtime keeps (its MAX_CAPTURE_SIZE is 1800)."""


@dataclass(frozen=True, slots=True)
class Machine:
    soc: str
    generation: str
    """One of GENERATIONS."""
    num_streams: int
    graphs: bool
    """aclmdlRICaptureBegin is documented for 910B, 910C and later, not for 310P."""
    allows_stale: bool


def machine() -> Machine:
    """Read at every call, so that a test can change it."""
    soc = os.environ.get("NPU_SIMULATOR_SOC") or "Ascend910B3"
    generation = next((name for prefix, name in _PREFIXES.items() if soc.startswith(prefix)), None)
    if generation is None:
        raise ValueError(f"NPU_SIMULATOR_SOC={soc}: known chips begin with {', '.join(_PREFIXES)}")
    return Machine(
        soc=soc,
        generation=generation,
        num_streams=int(os.environ.get("NPU_SIMULATOR_STREAMS") or _STREAMS),
        graphs=generation != "310P",
        allows_stale=os.environ.get("NPU_SIMULATOR_STALE") == "allow",
    )
