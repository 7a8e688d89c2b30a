"""Collectives over HCCL, one group of the vendor's for each purpose, without torch's global default group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import ProcessGroupCommunicator
from anychip.plugin_api import DeviceFault, GroupSpec
from anychip_ascend.faults import explained
from anychip_ascend.runtime import device_module

LEAST_BUFFER_MIB = 1

NO_PIPELINE = (
    "stages of a pipeline send both ways at once, and its sends take turns on a stream with what it receives: two "
    "stages would wait for each other"
)


class HcclCommunicator(ProcessGroupCommunicator):
    """Calls are issued on the current stream and may be captured: to wait is to make the stream wait.

    HCCL takes its buffers for each group, for sending and again for receiving, when the group is first used. So a group
    asks for as much as its longest message needs, and for `buffer_mib` at most: longer messages go in parts."""

    name = "hccl"

    def __init__(self, spec: GroupSpec, device: str, buffer_mib: int) -> None:
        self._device = torch.device(device)
        self.buffer_mib = bounded_buffer(spec.max_message_bytes, buffer_mib)
        super().__init__(spec)

    def make_group(self, store: Any, timeout: timedelta) -> Any:
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL

        options = ProcessGroupHCCL.Options()
        options.is_high_priority_stream = False
        options._timeout = timeout
        options.global_ranks_in_group = list(self.spec.ranks)
        options.hccl_config = {"hccl_buffer_size": self.buffer_mib}
        return ProcessGroupHCCL(store, self.rank, self.size, options)

    def fault(self, what: str, kind: str) -> DeviceFault:
        """Names the group, and says what HCCL's own code means where it gives one."""
        known = explained(what, str(self._device))
        if known is None:
            return super().fault(what, kind)
        spec = self.spec
        return DeviceFault(f"{spec.purpose}, rank {self.rank} of {spec.ranks}: {known}", kind=known.kind, fatal=True)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Into one tensor: lists of tensors are flattened and filled up within the wheel, which no graph holds."""
        x = x.contiguous()
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._wait(self._group._allgather_base(gathered, x))
        return torch.cat(gathered.unbind(), dim=dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        parts = torch.stack(x.chunk(self.size, dim=dim))
        mine = torch.empty_like(parts[0])
        self._wait(self._group._reduce_scatter_base(mine, parts))
        return mine

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device=self._device))
        device_module().synchronize(self._device)


def bounded_buffer(message_bytes: int, most_mib: int) -> int:
    """MiB of a group's buffers: enough for its longest message, between the least that HCCL has and the bound."""
    return max(LEAST_BUFFER_MIB, min(most_mib, -(-message_bytes >> 20)))
