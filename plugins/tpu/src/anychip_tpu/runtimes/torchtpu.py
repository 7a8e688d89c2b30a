"""torch_tpu: the successor of torch_xla, with torch's own device "tpu" and compiler backend "tpu".

Written to the documented calls of torch_tpu 0.2.0, and never run: without a TPU its package imports and no more. One
process drives one device, as the package has it; what is divided among devices is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_tpu  # noqa: F401 - brings the device and the backend
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from anychip.plugin_api import MemoryInfo, Placed, Unsupported
from anychip_tpu.runtimes import Traced


class TorchTpuProgram:
    """See Runtime.compile. The first run compiles, so it is made at once, over the example."""

    def __init__(self, fn: Traced, example: Sequence[Tensor]) -> None:
        # A graph of aten ops first: the backend then need not follow core's Python.
        graph = make_fx(fn)(*example)
        self._run = torch.compile(graph, backend="tpu", fullgraph=True, dynamic=False)
        self._run(*example)

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        return list(self._run(*arguments))


class TorchTpuRuntime:
    name = "torchtpu"
    num_devices = 1

    def __init__(self, index: int) -> None:
        if not torch.accelerator.is_available():
            raise Unsupported("torch_tpu", ["torch.accelerator sees no TPU; `anychip doctor` shows which are there"])
        self.torch_device = f"tpu:{index}"
        self.num_compilations = 0
        torch.accelerator.set_device_index(index)

    @property
    def device_kind(self) -> str:
        return ""  # kernels enter its programs in another way, which is not written

    def upload(self, host: Tensor, placed: Placed = ()) -> Tensor:
        return host.to(self.torch_device)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, placed: Placed = ()) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self.torch_device)

    def constrain(self, tensor: Tensor, placed: Placed) -> Tensor:
        return tensor

    def compile(self, fn: Traced, example: Sequence[Tensor], *, donated: Sequence[int] = ()) -> TorchTpuProgram:
        # The package documents no donation: a step makes new caches, and the old ones' memory is free afterwards.
        self.num_compilations += 1
        return TorchTpuProgram(fn, example)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.cpu() for tensor in tensors]

    def memory(self, index: int) -> MemoryInfo:
        return MemoryInfo(free=None, total=None)

    def synchronize(self) -> None:
        torch.accelerator.synchronize()
