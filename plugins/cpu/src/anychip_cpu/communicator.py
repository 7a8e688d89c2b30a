"""Collectives over gloo, one process group per GroupSpec, without torch's global default group; sums over the ranks of
one host in memory that they share."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from anychip.plugin_api import Communicator, DeviceFault, GroupSpec, Unsupported
from anychip_cpu.native import Kernels
from anychip_cpu.ops import CODES


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

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._fault(f"a rank is gone or did not answer: {error}", "peer_lost") from error

    def _fault(self, what: str, kind: str) -> DeviceFault:
        spec = self.spec
        return DeviceFault(f"{spec.purpose}, rank {self.rank} of {spec.ranks}: {what}", kind=kind, fatal=True)

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._wait(self._group.allreduce([x]))
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(self._group.allgather([parts], [x]))
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
        self._wait(self._group.alltoall_base(out, x, [], []))
        return out

    def all_to_all_v(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(receive), *x.shape[1:]))
        self._wait(self._group.alltoall_base(out, x.contiguous(), list(receive), list(send)))
        return out

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        x = x.contiguous()
        self._wait(self._group.broadcast(x, root))
        return x

    def send(self, x: Tensor, to: int) -> None:
        self._wait(self._group.send([x.contiguous()], to, 0))

    def recv(self, x: Tensor, source: int) -> Tensor:
        self._wait(self._group.recv([x], source, 0))
        return x

    def barrier(self) -> None:
        self._wait(self._group.barrier())

    def restore(self) -> None:
        self._generation += 1
        self._group = self._open()


_SHARED = Path("/dev/shm")
_LINE = 64
_SLOT = 1 << 20
"""Bytes of one rank's part; what is longer goes in pieces."""


def communicator(spec: GroupSpec, kernels: Kernels | None) -> Communicator:
    """The fastest for a group: nothing for one rank, shared memory for sums within a host, gloo otherwise."""
    if spec.size == 1:
        return Communicator(spec)
    one_host = spec.store.startswith("file://") and _SHARED.is_dir()
    return GlooCommunicator(spec) if kernels is None or not one_host else SharedMemoryCommunicator(spec, kernels)


class SharedMemoryCommunicator(GlooCommunicator):
    """Every rank copies its part into the region, waits for the others, and adds all parts in order of rank: the same
    bits everywhere. Other collectives, and other dtypes than the models', are gloo's."""

    name = "shared-memory"

    def __init__(self, spec: GroupSpec, kernels: Kernels) -> None:
        super().__init__(spec)
        self._kernels = kernels
        self._region = self._open_region()

    def _open_region(self) -> mmap.mmap:
        spec = self.spec
        who = f"{spec.store} {spec.purpose} {spec.ranks} {self._generation}"
        path = _SHARED / f"anychip-{hashlib.sha256(who.encode()).hexdigest()[:24]}"
        nbytes = self.size * (_LINE + 2 * _SLOT)
        if self.rank == 0:
            path.write_bytes(b"")
            os.truncate(path, nbytes)
        self.barrier()
        with path.open("r+b") as file:
            region = mmap.mmap(file.fileno(), nbytes)
        self.barrier()
        if self.rank == 0:
            path.unlink()  # it lives as long as somebody has it open
        return region

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype not in CODES:
            return super().all_reduce(x)
        x = x.contiguous()
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._region))
        timeout = float(self.spec.timeout_s)
        if not self._kernels.all_reduce(
            address, self.rank, self.size, _SLOT, x.data_ptr(), x.numel(), CODES[x.dtype], timeout
        ):
            raise self._fault(f"in a sum, a rank did not come within {timeout:g} s", "timeout")
        return x

    def restore(self) -> None:
        super().restore()
        self._region = self._open_region()
