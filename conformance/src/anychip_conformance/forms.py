"""Forms of tensors: the same values laid out as views that the interface allows (plugin_api/ops.py, Form). What lies
between and around them is poison: who reads a view as though it were a tensor of its own reads that."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Form = Literal["tidy", "offset", "padded", "sliced", "spaced", "turned", "expanded"]
"""tidy: contiguous, in storage of its own. offset: it begins one element into its storage. padded: rows of storage
before and behind it. sliced: columns of something wider. spaced: every other row of something longer. turned: of three
dimensions, the first two are swapped in storage. expanded: all rows are the first, with a stride of 0."""
FORMS: tuple[Form, ...] = get_args(Form)[1:]
_BEFORE = 2
"""Columns before a slice."""
_NO_ID = 2**30 - 1
"""Stands where an integer should not be read: no place of anything."""


def laid_out(tensor: Tensor, form: Form, *, written: bool = False) -> Tensor:
    """A contiguous tensor's values in a form, on its device. `written`: it may be overwritten, and so has no stride
    of 0. Where a form needs more dimensions than there are, and for integers that cannot be all alike, it is an
    offset."""
    if form == "tidy" or tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    rows, columns = tensor.shape[0], tensor.shape[-1]
    if form == "expanded" and tensor.dim() > 1 and tensor.is_floating_point() and not written:
        return tensor[:1].expand_as(tensor)
    if form == "padded" and tensor.dim() > 1:
        return _poisoned(tensor, rows + 2, *tensor.shape[1:])[1:-1].copy_(tensor)
    if form == "sliced" and tensor.dim() > 1:
        wide = _poisoned(tensor, *tensor.shape[:-1], columns + _BEFORE + 3)
        return wide[..., _BEFORE : _BEFORE + columns].copy_(tensor)
    if form == "spaced" and tensor.dim() > 1:
        return _poisoned(tensor, 2 * rows, *tensor.shape[1:])[::2].copy_(tensor)
    if form == "turned" and tensor.dim() > 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    storage = _poisoned(tensor, tensor.numel() + 2)
    return storage[1:-1].view(tensor.shape).copy_(tensor)


def _poisoned(like: Tensor, *shape: int) -> Tensor:
    """Storage full of what nobody may read."""
    value: float = math.nan if like.is_floating_point() else min(_NO_ID, torch.iinfo(like.dtype).max)
    return torch.full(shape, value, dtype=like.dtype, device=like.device)
