"""Philox4x32-10 on integer tensors, as docs/reference/randomness.md specifies it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10

PURPOSE_TOKEN = 0
"""The draw of an output token. Other purposes (draft acceptance, resampling) get numbers of their own."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for each counter of four and key of two words. All are int64 tensors holding 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words. By halves of the multiplier: the whole product overflows
    int64, and devices differ in how they shift a negative number."""
    low = word * (multiplier & 0xFFFF)
    carried = word * (multiplier >> 16) + (low >> 16)
    return carried >> 16, ((carried & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(seed_low: Tensor, seed_high: Tensor, sample_index: Tensor, position: Tensor, purpose: int) -> Tensor:
    """One float64 in [0, 1) per row, from 53 bits of the first two words.

    All inputs are integer tensors [rows]; a draw depends on nobody else in the batch.
    """
    key = (seed_low.to(torch.int64) & _WORD, seed_high.to(torch.int64) & _WORD)
    index, place = sample_index.to(torch.int64) & _WORD, position.to(torch.int64) & _WORD
    counter = (place, index, torch.full_like(place, purpose), torch.zeros_like(place))
    first, second, _, _ = philox(counter, key)
    return ((first >> 5) * 2**26 + (second >> 6)).to(torch.float64) * 2.0**-53
