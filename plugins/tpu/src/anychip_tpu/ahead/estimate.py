"""What a step takes at least, by the chip's peaks: a roofline. Nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anychip.plugin_api import AttentionSpec, ShapeKey
from anychip_tpu.ahead.compiler import Compiled
from anychip_tpu.ahead.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a step asks of one device beside what the compiler counts."""

    weight_bytes: float  # that are read
    kv_bytes: float  # that are read
    attention_flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds. Products overlap with reads of memory; transfers between chips overlap with neither."""

    compute: float
    memory: float
    collectives: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.collectives

    @property
    def bound(self) -> str:
        parts = {"products": self.compute, "HBM": self.memory, "links": self.collectives}
        return max(parts, key=lambda name: parts[name])


def attention_load(specs: Sequence[AttentionSpec], key: ShapeKey, context: int, item_bytes: int) -> tuple[float, float]:
    """(bytes of keys and values that are read, operations) of all layers, one spec for each, of one device's heads:
    every row has `context` keys before the step. A row's tokens share one read of them."""
    rows, nbytes, flops = key.num_reqs, 0.0, 0.0
    new_by_row = key.num_tokens / rows
    for spec in specs:
        seen = context + new_by_row / 2
        if spec.window is not None:
            seen = min(seen, spec.window)
        nbytes += 2 * rows * seen * spec.num_kv_heads * spec.head_dim * item_bytes
        flops += 4 * key.num_tokens * seen * spec.num_heads * spec.head_dim
    return nbytes, flops


def estimate(compiled: Compiled, load: Load, topology: Topology, dtype: str) -> Estimate:
    chip = topology.generation
    per_device = chip.devices_per_chip
    return Estimate(
        compute=(compiled.flops + load.attention_flops) / chip.peak(dtype),
        memory=(load.weight_bytes + load.kv_bytes + 2 * compiled.temporary_bytes) / (chip.hbm_bytes_per_s / per_device),
        collectives=2 * compiled.collective_bytes / (chip.ici_bytes_per_s / per_device)
        if topology.num_devices > 1
        else 0.0,
    )
