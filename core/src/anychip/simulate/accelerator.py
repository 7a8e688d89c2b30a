"""What one device of a kind can do, and what joins several. Read from a file: core knows no vendor's devices."""

from __future__ import annotations

from pathlib import Path

import msgspec

from anychip.errors import ConfigError


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device's way to others, in one direction."""

    gb_per_s: float
    latency_us: float
    """Of one message."""


class Accelerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates are what kernels reach, not what a data sheet promises. `source` says where each comes from."""

    name: str
    memory_gib: float
    read_gb_per_s: float
    """Of device memory."""
    tflops: dict[str, float]
    """Of matrix products, by the type of their inputs: "bfloat16" must be there; "fp8", "int8" may be."""
    kernel_us: float
    """What a kernel takes beyond its bytes and products: its launch in a graph, its first loads, its tail."""
    devices_per_node: int
    node: Link
    """Between devices of one node."""
    network: Link
    """Between devices of different nodes."""
    overlap: float = 0.0
    """The share of communication that runs behind computation, 0 to 1."""
    source: str

    def __post_init__(self) -> None:
        for name in ("memory_gib", "read_gb_per_s", "devices_per_node"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if "bfloat16" not in self.tflops:
            raise ValueError(f"tflops has {', '.join(self.tflops) or 'nothing'}; it needs bfloat16")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap is {self.overlap}; expected 0 to 1")

    def rate(self, dtype: str) -> float:
        """Operations a second of products with inputs of `dtype`; bfloat16's where it has no rate for it."""
        return 1e12 * self.tflops.get(dtype, self.tflops["bfloat16"])


def read_accelerator(path: Path) -> Accelerator:
    """Raises ConfigError for a file that is missing, or that says something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Accelerator)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); --accelerator takes a JSON file, such as those of "
            "benchmarks/simulation/accelerators"
        ) from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"{path} describes no accelerator: {error}") from error
