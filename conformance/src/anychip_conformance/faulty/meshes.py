"""Faults of programs that divide a model over a mesh of devices: experts over two, tensors over two."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anychip.plugin_api import Axis, Communicator, GroupSpec, Mesh, MeshShape
from anychip_conformance.fakes.spmd import SpmdStepProgram
from anychip_conformance.faulty.ranks import Wrapped
from anychip_conformance.faulty.registry import fault


# A model without experts hides it: every sum is twice as large, and norms divide that out.
@fault("mesh-sums-over-every-device", "mesh", killed_by="e2e.greedy.002")
class SumsOverEveryDevice(SpmdStepProgram):
    """A sum along an axis is one over all devices."""

    def communicator(self, group: GroupSpec) -> Communicator:
        return EveryDevice(super().communicator(group), super().communicator(replace(group, ranks=self._ranks)))


class EveryDevice(Wrapped):
    def __init__(self, inner: Communicator, world: Communicator) -> None:
        super().__init__(inner)
        self.world = world

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.world.all_reduce(x)


@fault("mesh-coordinates-transposed", "mesh", killed_by="e2e.greedy.001")
class CoordinatesTransposed(SpmdStepProgram):
    """Weights are divided by one order of the axes, and devices meet by the other."""

    def communicator(self, group: GroupSpec) -> Communicator:
        other = {1: 2, 2: 1}[group.ranks[1] - group.ranks[0]]
        ranks = tuple(sorted((group.rank, group.rank ^ other)))
        return super().communicator(replace(group, ranks=ranks))


@fault("mesh-gathers-in-another-order", "mesh", killed_by="e2e.greedy.001")
class GathersInAnotherOrder(SpmdStepProgram):
    """Parts come with the last device's first."""

    def communicator(self, group: GroupSpec) -> Communicator:
        return LastFirst(super().communicator(group))


class LastFirst(Wrapped):
    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(super().all_gather(x, dim).chunk(self.size, dim=dim)[::-1], dim=dim)


class LoadsFor(Mesh):
    """The weights of another rank, and the communicators of `own`."""

    def __init__(self, own: Mesh, axis: Axis) -> None:
        peers = own.shape.peers(axis, own.rank)
        neighbour = peers[(peers.index(own.rank) + 1) % len(peers)]
        super().__init__(own.shape, neighbour, Communicator)
        self._own = own

    def axis(self, name: Axis) -> Communicator:
        return self._own.axis(name)


@fault("mesh-loads-a-neighbours-tensors", "mesh", killed_by="e2e.greedy.001")
class LoadsANeighboursTensors(SpmdStepProgram):
    """One device loads the shares of its neighbour along tp."""

    def mesh(self, shape: MeshShape, rank: int) -> Mesh:
        own = super().mesh(shape, rank)
        return LoadsFor(own, "tp") if rank == 1 else own


@fault("mesh-loads-a-neighbours-experts", "mesh", killed_by="e2e.greedy.002")
class LoadsANeighboursExperts(SpmdStepProgram):
    """One device loads the experts of its neighbour along ep."""

    def mesh(self, shape: MeshShape, rank: int) -> Mesh:
        own = super().mesh(shape, rank)
        return LoadsFor(own, "ep") if rank == 3 else own


@fault("mesh-experts-not-summed", "mesh", killed_by="e2e.greedy.002")
class ExpertsNotSummed(SpmdStepProgram):
    """What the experts of other devices make is left out."""

    def communicator(self, group: GroupSpec) -> Communicator:
        inner = super().communicator(group)
        return NoSum(inner) if group.purpose == "ep" else inner


class NoSum(Wrapped):
    def all_reduce(self, x: Tensor) -> Tensor:
        return x
