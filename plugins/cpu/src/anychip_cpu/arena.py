"""Storage of recorded steps: what a tensor that has gone leaves is given out again, and none of it moves."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from anychip_cpu.memory import zeroed

_ALIGN = 64


class Arena:
    """Steps of one arena run one after the other: they share what none of them keeps."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._free: dict[int, list[Tensor]] = defaultdict(list)  # by size
        self._lent: dict[int, tuple[weakref.ref[np.ndarray], Tensor]] = {}  # by address

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros. What a kernel that is not run would have written may be an index of what is."""
        nbytes = math.prod(shape) * dtype.itemsize
        size = max(_ALIGN, -(-nbytes // _ALIGN) * _ALIGN)
        free = self._free[size]
        if free:
            block = free.pop().zero_()
        else:
            block = zeroed(size)
            self.nbytes += size
        # The tensor's storage, and so every view of it, holds this array: it goes with the last of them.
        array = block.numpy()[:nbytes]
        address = block.data_ptr()
        self._lent[address] = weakref.ref(array, lambda _: self._give_back(address, size)), block
        return torch.from_numpy(array).view(dtype).view(shape)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._lent

    def _give_back(self, address: int, size: int) -> None:
        self._free[size].append(self._lent.pop(address)[1])
