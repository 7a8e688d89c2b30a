"""Faults of communicators along the axes of a mesh: four ranks, two axes of two."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from anychip.plugin_api import Communicator
from anychip_conformance.faulty.plain import plain_communicator
from anychip_conformance.faulty.ranks import Wrapped
from anychip_conformance.faulty.registry import fault

_WORLD = tuple(range(4))


@fault("comm-axis-is-the-world", "communicator", killed_by="comm.mesh.003")
class AxisIsTheWorld(Wrapped):
    """A sum along an axis is the sum over all ranks."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        world = replace(inner.spec, ranks=_WORLD, purpose=f"{inner.spec.purpose}-world")
        self.world = inner if inner.size == len(_WORLD) else plain_communicator(world, None)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.world.all_reduce(x)


@fault("comm-axes-transposed", "communicator", killed_by="comm.mesh.004")
class AxesTransposed(Wrapped):
    """Ranks are counted with the first axis fastest: what is asked along one axis goes along the other."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        spec = inner.spec
        other = {1: 2, 2: 1}.get(spec.ranks[-1] - spec.ranks[0])
        if spec.size == 2 and other is not None:
            ranks = tuple(sorted((spec.rank, spec.rank ^ other)))
            self.inner = plain_communicator(replace(spec, ranks=ranks), None)


@fault("comm-groups-kept-by-size", "communicator", killed_by="comm.mesh.001")
class GroupsKeptBySize(Wrapped):
    """A group of as many ranks as an earlier one is taken for that one."""

    kept: ClassVar[dict[int, Communicator]] = {}

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.inner = self.kept.setdefault(inner.size, inner)


@fault("comm-joined-axis-in-another-order", "communicator", killed_by="comm.mesh.001")
class JoinedAxisInAnotherOrder(Wrapped):
    """Along an axis that is joined from two, parts come with the first of these fastest."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        parts = super().all_gather(x, dim).chunk(self.size, dim=dim)
        order = (0, 2, 1, 3) if self.size == len(_WORLD) else range(self.size)
        return torch.cat([parts[place] for place in order], dim=dim)
