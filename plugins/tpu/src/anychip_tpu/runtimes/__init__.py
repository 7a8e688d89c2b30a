"""Runtimes that execute compiled programs: torch_xla, and torch_tpu, its successor. Nothing else knows either.

`choice` says which one is installed and imports nothing heavy; `open_runtime` opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anychip.plugin_api import MemoryInfo, Placed

Traced = Callable[..., Sequence["Tensor"]]
"""A function of tensors that returns tensors. It reads no value, and its shapes follow from its arguments'."""


class Program(Protocol):
    """A compiled function: tensors of the shapes, dtypes and placements that it was compiled for go in."""

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Starts it. An argument that was donated must not be used again."""
        ...


class Runtime(Protocol):
    """One process's devices. `torch_device` stands for all of them."""

    name: str
    torch_device: str
    num_devices: int

    @property
    def device_kind(self) -> str:
        """What the runtime calls its devices, such as "TPU v5 lite"."""
        ...

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        ...

    def upload(self, host: Tensor, placed: Placed = ()) -> Tensor:
        """A host tensor on the devices: whole on each, or divided as `placed` says where that is possible."""
        ...

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, placed: Placed = ()) -> Tensor:
        """Zeros that never lie on the host."""
        ...

    def constrain(self, tensor: Tensor, placed: Placed) -> Tensor:
        """Within a traced function: how a value lies over the devices."""
        ...

    def compile(self, fn: Traced, example: Sequence[Tensor], *, donated: Sequence[int] = ()) -> Program:
        """Traces `fn` over example arguments, without running it, and compiles it. Tensors of the devices that it
        closes over become inputs. The program may write into the arguments at the places `donated`. Raises Unsupported
        where an op of it has no form on the device."""
        ...

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """On the host, once they are computed."""
        ...

    def memory(self, index: int) -> MemoryInfo: ...

    def synchronize(self) -> None:
        """Waits for all that was started."""
        ...
