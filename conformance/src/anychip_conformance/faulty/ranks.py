"""Faults of communicators: wrappers around the host's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anychip.plugin_api import Communicator
from anychip_conformance.faulty.registry import fault

_VECTOR = 4
"""Elements of one vector access of the imagined kernels."""


class Wrapped(Communicator):
    """Passes everything on."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner.spec)
        self.inner = inner

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.inner.all_reduce(x)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return self.inner.all_gather(x, dim)

    def all_gather_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        return self.inner.all_gather_v(x, sizes, dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self.inner.reduce_scatter(x, dim)

    def reduce_scatter_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        return self.inner.reduce_scatter_v(x, sizes, dim)

    def all_to_all(self, x: Tensor) -> Tensor:
        return self.inner.all_to_all(x)

    def all_to_all_v(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self.inner.all_to_all_v(x, send, receive)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        return self.inner.broadcast(x, root)

    def send(self, x: Tensor, to: int) -> None:
        self.inner.send(x, to)

    def recv(self, x: Tensor, source: int) -> Tensor:
        return self.inner.recv(x, source)

    def barrier(self) -> None:
        self.inner.barrier()

    def close(self) -> None:
        self.inner.close()

    def restore(self) -> None:
        self.inner.restore()


@fault("comm-tail-dropped", "communicator", killed_by="comm.all_reduce.003")
class TailDropped(Wrapped):
    """What does not fill a vector is left out of the sum."""

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.clone().flatten()
        whole = len(flat) // _VECTOR * _VECTOR
        flat[:whole] = super().all_reduce(flat[:whole].clone())
        return flat.view_as(x)


@fault("comm-gather-keeps-padding", "communicator", killed_by="comm.all_gather_v.002")
class GatherKeepsPadding(Wrapped):
    """Uneven parts come back padded to the longest."""

    def all_gather_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        shape = list(x.shape)
        shape[dim] = max(sizes) - shape[dim]
        return self.inner.all_gather(torch.cat((x, x.new_zeros(shape)), dim=dim), dim)


@fault("comm-subgroup-uses-the-world", "communicator", killed_by="comm.subgroup.009")
class SubgroupUsesTheWorld(Wrapped):
    """Ranks within a group are taken for ranks of the world."""

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        ranks = self.spec.ranks
        return super().broadcast(x, ranks.index(root) if root in ranks else 0)


@fault("comm-subgroup-sorted", "communicator", killed_by="comm.subgroup.007")
class SubgroupSorted(Wrapped):
    """Parts come in the order of world ranks instead of the group's."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        parts = super().all_gather(x, dim).chunk(self.size, dim=dim)
        order = sorted(range(self.size), key=lambda place: self.spec.ranks[place])
        return torch.cat([parts[place] for place in order], dim=dim)


@fault("comm-ranks-differ-in-the-last-bit", "communicator", killed_by="comm.all_reduce.004")
class RanksDifferInTheLastBit(Wrapped):
    """Each rank adds in an order of its own."""

    def all_reduce(self, x: Tensor) -> Tensor:
        total = super().all_reduce(x)
        exact = total == total.round()
        return torch.where(exact, total, total * (1 + 2.0**-22 * self.rank))


@fault("comm-wrong-share", "communicator", killed_by="comm.reduce_scatter.001")
class WrongShare(Wrapped):
    """Each rank keeps its neighbour's share."""

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self.inner.all_reduce(x.clone()).chunk(self.size, dim=dim)[(self.rank + 1) % self.size]


@fault("comm-input-reduced", "communicator", killed_by="comm.reduce_scatter.001")
class InputReduced(Wrapped):
    """The input of reduce_scatter holds the sum afterwards."""

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        x.copy_(self.inner.all_reduce(x.clone()))
        return x.chunk(self.size, dim=dim)[self.rank]


@fault("comm-gather-along-the-first", "communicator", killed_by="comm.all_gather.010")
class GatherAlongTheFirst(Wrapped):
    """Parts are stacked along the first dimension, whichever was asked for."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return super().all_gather(x, 0)


@fault("comm-closed-for-good", "communicator", killed_by="comm.restore.001")
class ClosedForGood(Wrapped):
    """restore does not open the group again."""

    closed = False

    def close(self) -> None:
        self.closed = True

    def restore(self) -> None:
        return

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.closed:
            raise RuntimeError("the group is closed")
        return super().all_reduce(x)


class SendsLater(Wrapped):
    """Sends nothing before something is to be received."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.waiting: list[tuple[Tensor, int]] = []

    def send(self, x: Tensor, to: int) -> None:
        self.waiting.append((x, to))

    def recv(self, x: Tensor, source: int) -> Tensor:
        waiting, self.waiting = self.waiting, []
        for sent, to in waiting:
            self.inner.send(sent, to)
        return self.inner.recv(x, source)


@fault("comm-send-reads-later", "communicator", killed_by="comm.send_ahead.001")
class SendReadsLater(SendsLater):
    """What is sent is read when it goes, and not when it was given."""


@fault("comm-send-newest-first", "communicator", killed_by="comm.send_ahead.002")
class SendNewestFirst(SendsLater):
    """Of tensors that wait, those of one size overtake each other."""

    def send(self, x: Tensor, to: int) -> None:
        self.waiting.insert(0, (x.clone(), to))

    def recv(self, x: Tensor, source: int) -> Tensor:
        # As many as were sent of each size: the receiver's shapes fit, and the values do not.
        by_size: dict[int, list[tuple[Tensor, int]]] = {}
        for sent, to in self.waiting:
            by_size.setdefault(len(sent), []).append((sent, to))
        self.waiting = [by_size[len(sent)].pop(0) for sent, _ in reversed(self.waiting)]
        return super().recv(x, source)
