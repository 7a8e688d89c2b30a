"""Collectives over gloo, one process group per GroupSpec, without torch's global default group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from anychip.plugin_api import Communicator, GroupSpec, Unsupported


class GlooCommunicator(Communicator):
    name = "gloo"

    def __init__(self, spec: GroupSpec) -> None:
        super().__init__(spec)
        self._generation = 0
        self._group = self._open()

    def _open(self) -> dist.ProcessGroupGloo:
        spec = self.spec
        kind, _, place = spec.store.partition("://")
        if kind == "file":
            # -1: the number of processes is not checked, since several groups meet in one file.
            store: dist.Store = dist.FileStore(place, -1)
        elif kind == "tcp":
            host, _, port = place.rpartition(":")
            store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        else:
            raise Unsupported("anychip-cpu communicator", [f"store {spec.store!r}; known are file:// and tcp://"])
        # Addresses of a group that was closed stay in the store: one that is opened again meets under a new name.
        name = f"{spec.purpose}-{'-'.join(map(str, spec.ranks))}-{self._generation}"
        return dist.ProcessGroupGloo(
            dist.PrefixStore(name, store), self.rank, self.size, timedelta(seconds=spec.timeout_s)
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=dim)

    def all_gather_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        rows = x.movedim(dim, 0)
        longest = max(sizes)
        padded = x.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = self.all_gather(padded.unsqueeze(0), dim=0)
        kept = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
        return kept.movedim(0, dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self.all_reduce(x.clone()).chunk(self.size, dim=dim)[self.rank]

    def reduce_scatter_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        return self.all_reduce(x.clone()).split(list(sizes), dim=dim)[self.rank]

    def all_to_all(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        self._group.alltoall_base(out, x, [], []).wait()
        return out

    def all_to_all_v(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(receive), *x.shape[1:]))
        self._group.alltoall_base(out, x.contiguous(), list(receive), list(send)).wait()
        return out

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        x = x.contiguous()
        self._group.broadcast(x, root).wait()
        return x

    def send(self, x: Tensor, to: int) -> None:
        self._group.send([x.contiguous()], to, 0).wait()

    def recv(self, x: Tensor, source: int) -> Tensor:
        self._group.recv([x], source, 0).wait()
        return x

    def barrier(self) -> None:
        self._group.barrier().wait()

    def restore(self) -> None:
        self._generation += 1
        self._group = self._open()
