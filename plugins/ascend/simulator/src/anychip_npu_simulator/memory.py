"""Simulated device memory is host memory: a tensor on the device and its alias on the host are the same bytes."""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

FRACTAL_NZ = 29
"""The vendor's number of the layout of 16x16 tiles that its matrix unit reads. The tag lies in the vendor's own
descriptor of a storage; the simulator keeps the values in row-major order whatever the tag says."""

_CPU = torch.device("cpu")
_construct: Any = torch._C._construct_storage_from_data_pointer


def host(tensor: Tensor) -> Tensor:
    """The bytes of a device tensor as a CPU tensor, without a copy. A CPU tensor is its own alias."""
    if tensor.device.type != "npu":
        return tensor
    storage = tensor.untyped_storage()
    alias = torch.empty(0, dtype=tensor.dtype)
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    alias.set_(
        _construct(storage.data_ptr(), _CPU, storage.nbytes()), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    return alias


def device(values: Tensor, where: torch.device) -> Tensor:
    """A new device tensor of these values and strides."""
    out = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=where)
    host(out).copy_(values)
    return out


def is_nz(tensor: Tensor) -> bool:
    return tensor.device.type == "npu" and int(torch_npu.get_npu_format(tensor)) == FRACTAL_NZ


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in an argument or a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return [tensor for item in value.values() for tensor in tensors(item)] if isinstance(value, dict) else []


def convert(value: Any, one: Any) -> Any:
    """The same nest of lists, tuples and dicts with one(tensor) in place of every tensor."""
    if isinstance(value, Tensor):
        return one(value)
    if isinstance(value, list | tuple):
        return type(value)([convert(item, one) for item in value])
    return {key: convert(item, one) for key, item in value.items()} if isinstance(value, dict) else value
