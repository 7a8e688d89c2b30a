"""Ranks of one process, a thread each, that meet in collectives: what layers need of a group, without starting one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from anychip.plugin_api import Communicator, GroupSpec

R = TypeVar("R")
_TIMEOUT_S = 60.0


class Group:
    """Where the ranks of one axis meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=_TIMEOUT_S)
        self.slots: list[object] = [None] * size
        self.wires = {(a, b): queue.Queue[Tensor]() for a in range(size) for b in range(size)}


class ThreadCommunicator(Communicator):
    name = "threads"

    def __init__(self, spec: GroupSpec, group: Group) -> None:
        super().__init__(spec)
        self.group = group

    def _exchange(self, mine: object) -> list[object]:
        self.group.slots[self.rank] = mine
        self.group.barrier.wait()
        everybody = list(self.group.slots)
        self.group.barrier.wait()
        return everybody

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(dim=0)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._exchange(x), dim=dim)

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.cat([part.chunk(self.size)[self.rank] for part in self._exchange(x)])

    def all_to_all_v(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        parts = self._exchange(x.split(list(send)))
        found = [part[self.rank] for part in parts]
        assert [len(part) for part in found] == list(receive)
        return torch.cat(found)

    def send(self, x: Tensor, to: int) -> None:
        self.group.wires[self.rank, to].put(x.clone())

    def recv(self, x: Tensor, source: int) -> Tensor:
        return x.copy_(self.group.wires[source, self.rank].get(timeout=_TIMEOUT_S))


def on_ranks(size: int, run: Callable[[Callable[[GroupSpec], Communicator], int], R]) -> list[R]:
    """By rank, what run(communicator, rank) gives; `communicator` is Platform.communicator."""
    groups: dict[tuple[str, tuple[int, ...]], Group] = {}
    lock = threading.Lock()

    def communicator(spec: GroupSpec) -> Communicator:
        with lock:
            group = groups.setdefault((spec.purpose, spec.ranks), Group(spec.size))
        return ThreadCommunicator(spec, group)

    with ThreadPoolExecutor(size) as threads:
        return [each.result() for each in [threads.submit(run, communicator, rank) for rank in range(size)]]
