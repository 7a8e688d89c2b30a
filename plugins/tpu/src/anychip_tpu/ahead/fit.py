"""Whether a model's weights and one request fit into a slice, and which slices would hold them. Compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from anychip_tpu.ahead.compiler import gib
from anychip_tpu.ahead.topology import Topology, known
from anychip_tpu.pallas.generations import Generation

USABLE = 0.9
"""Of a chip's memory: the rest is for a step's values and the runtime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    weight_bytes: int  # of the whole model
    request_bytes: int  # of the cache of one longest request, all heads
    num_heads: int
    num_kv_heads: int

    def per_device(self, devices: int) -> float:
        """KV heads are repeated where there are fewer than devices."""
        return self.weight_bytes / devices + self.request_bytes / min(devices, self.num_kv_heads)

    def divides(self, devices: int) -> bool:
        kv = self.num_kv_heads
        return self.num_heads % devices == 0 and (kv % devices == 0 or devices % kv == 0)


def problems(size: ModelSize, topology: Topology) -> list[str]:
    """Why the model cannot run on the slice, each with numbers and what would do."""
    chip, devices = topology.generation, topology.num_devices
    if not size.divides(devices):
        fits = [str(each) for each in known(chip) if size.divides(each.num_devices)]
        return [
            f"{size.num_heads} heads over {size.num_kv_heads} KV heads do not divide over the {devices} devices of "
            f"{topology}; they do over those of {', '.join(fits) or 'no slice of ' + chip.name}"
        ]
    need, have = size.per_device(devices), usable(chip)
    if need <= have:
        return []
    return [
        f"each of the {devices} devices of {topology} needs {gib(need)} for weights and one longest request and has "
        f"{gib(have)} for them, {gib(need - have)} too little; {_remedy(size, chip)}"
    ]


def usable(chip: Generation) -> float:
    return chip.hbm_bytes_per_device * USABLE


def smallest(size: ModelSize, chip: Generation) -> Topology | None:
    return next(_holding(size, chip), None)


def _holding(size: ModelSize, chip: Generation) -> Iterator[Topology]:
    for each in known(chip):
        if size.divides(each.num_devices) and size.per_device(each.num_devices) <= usable(chip):
            yield each


def _remedy(size: ModelSize, chip: Generation) -> str:
    found = smallest(size, chip)
    if found is not None:
        return f"the smallest slice that holds it is {found}"
    return f"no slice of {chip.name} holds it: lower --max-model-len, or quantize"
