"""Sees computing on the host while a device's kernels should run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SMALL = 1024
"""Elements below which a host tensor is bookkeeping."""
_MOVES = ("aten::_to_copy", "aten::copy_", "aten::empty", "aten::detach", "aten::view", "aten::alias", "aten::slice")


class HostWatch(TorchDispatchMode):
    """`found` names operations that produced large tensors on the host from tensors on the host. On a device that is
    torch's cpu there is nothing to see."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._blind = device_type == "cpu"
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if not self._blind and not name.startswith(_MOVES) and any(_large_on_host(item) for item in _flat(result)):
            self.found.add(name)
        return result


def _large_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() >= _SMALL and tensor.dtype is not torch.bool


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _flat(item)] if isinstance(value, list | tuple) else []
