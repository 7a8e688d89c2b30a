"""Collectives over gloo; sums over the ranks of one host in memory that they share."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from anychip.ops.reference import ProcessGroupCommunicator
from anychip.plugin_api import Communicator, GroupSpec
from anychip_cpu.native import Kernels
from anychip_cpu.ops import CODES


class GlooCommunicator(ProcessGroupCommunicator):
    name = "gloo"

    def make_group(self, store: dist.Store, timeout: timedelta) -> dist.ProcessGroup:
        return dist.ProcessGroupGloo(store, self.rank, self.size, timeout)


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
            raise self.fault(f"in a sum, a rank did not come within {timeout:g} s", "timeout")
        return x

    def restore(self) -> None:
        super().restore()
        self._region = self._open_region()
