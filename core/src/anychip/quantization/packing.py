"""Small integers packed into int32 words, as checkpoints store them."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD_BITS = 32


def unpack(words: Tensor, dim: int, bits: int = 4) -> Tensor:
    """uint8 values of int32 words packed along `dim` (0 or 1), lowest bits first."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    mask = (1 << bits) - 1
    if dim == 0:
        return ((words.unsqueeze(1) >> shifts.view(1, -1, 1)) & mask).to(torch.uint8).flatten(0, 1)
    return ((words.unsqueeze(-1) >> shifts) & mask).to(torch.uint8).flatten(1)


def pack(values: Tensor, dim: int, bits: int = 4) -> Tensor:
    """The inverse of unpack, for the makers of checkpoints; the dimension fills whole words."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int64)
    wide = values.contiguous().long()
    if dim == 0:
        words = (wide.view(-1, len(shifts), wide.shape[1]) << shifts.view(1, -1, 1)).sum(dim=1)
    else:
        words = (wide.view(len(wide), -1, len(shifts)) << shifts).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Bits 4 i to 4 i + 3 of an AWQ word hold column AWQ_ORDER[i] of its eight."""


def from_awq_order(values: Tensor) -> Tensor:
    """Columns, unpacked from AWQ's words, in their own order."""
    return values.view(len(values), -1, 8)[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)


def to_awq_order(values: Tensor) -> Tensor:
    """The inverse of from_awq_order."""
    return values.view(len(values), -1, 8)[..., torch.tensor(AWQ_ORDER)].flatten(1)
