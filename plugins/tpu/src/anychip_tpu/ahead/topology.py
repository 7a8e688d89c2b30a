"""Slices of TPUs by name, such as v5e:2x4, and libtpu's description of them. No TPU is needed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from anychip.plugin_api import Unsupported
from anychip_tpu.pallas.generations import ALIASES, GENERATIONS, Generation

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
"""Slices that are rented, up to 512 chips; docs.cloud.google.com/tpu/docs, "Supported configurations" by generation."""
_HOST = (2, 2, 1)
"""Chips of one host, as libtpu counts them."""


@dataclass(frozen=True)
class Topology:
    """A slice: chips of one generation in a grid."""

    generation: Generation
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.generation.devices_per_chip

    @cached_property
    def devices(self) -> Sequence[Any]:
        """libtpu's descriptions of the devices. Raises Unsupported where libtpu does not know the slice."""
        from jax.experimental import topologies

        name = f"{self.generation.topology_name}:{'x'.join(map(str, self.shape))}"
        host = tuple(min(side, most) for side, most in zip((*self.shape, 1, 1), _HOST, strict=False))
        try:
            slice_ = topologies.get_topology_desc(topology_name=name, platform="tpu", chips_per_host_bounds=host)
        except Exception as error:  # jax raises several types, all of them with libtpu's words
            raise Unsupported("libtpu", [f"it does not describe {self}: {str(error).splitlines()[0]}"]) from error
        described: Sequence[Any] = slice_.devices
        if len(described) != self.num_devices:
            raise Unsupported("libtpu", [f"it gives {len(described)} devices for {self}, {self.num_devices} expected"])
        return described


def known(generation: Generation) -> Iterator[Topology]:
    """From the smallest slice to the largest."""
    for shape in _FLAT if generation.mesh_dims == 2 else _DEEP:
        yield Topology(generation, shape)


def parse(text: str) -> Topology:
    """A slice by its name. Raises ValueError that lists those that there are."""
    name, _, shape = text.strip().lower().partition(":")
    generation = GENERATIONS.get(ALIASES.get(name, name))
    if generation is None:
        listed = "; ".join(_names(each) for each in GENERATIONS.values())
        raise ValueError(f"topology {text!r}: no generation {name!r}; there are {listed}")
    sides = tuple(map(int, shape.split("x"))) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    if generation.mesh_dims == 3 and len(sides) == 2:
        sides = (*sides, 1)
    if sides not in [each.shape for each in known(generation)]:
        raise ValueError(f"topology {text!r} is no slice; there are {_names(generation)}")
    return Topology(generation, sides)


def _names(generation: Generation) -> str:
    return ", ".join(map(str, known(generation)))


def quiet_libtpu() -> None:
    """Before libtpu is loaded: it must not ask a cloud's metadata server which machine this is, nor mind that another
    process has it, since no device is opened."""
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "JAX_PLATFORMS": "cpu",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
