"""Collectives over the runtime's library, which torch calls NCCL on NVIDIA's devices and on AMD's, where it is RCCL."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from anychip.ops.reference import ProcessGroupCommunicator
from anychip.plugin_api import GroupSpec

NO_PIPELINE = (
    "stages of a pipeline send both ways at once, and its sends take turns on a stream with what it receives: two "
    "stages would wait for each other"
)


class RuntimeCommunicator(ProcessGroupCommunicator):
    """Calls are issued on the current stream and may be captured: to wait is to make the stream wait."""

    name = "nccl"

    def __init__(self, spec: GroupSpec, device: str) -> None:
        self._device = torch.device(device)
        super().__init__(spec)

    def make_group(self, store: dist.Store, timeout: timedelta) -> dist.ProcessGroup:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, self.rank, self.size, options)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        parts = [part.contiguous() for part in x.chunk(self.size, dim=dim)]
        mine = torch.empty_like(parts[0])
        self._wait(self._group.reduce_scatter([mine], [parts]))
        return mine

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device=self._device))
        torch.cuda.synchronize(self._device)
