"""What the bits of GGUF's block types mean. A block is codes, a scale for each group of them, and in some types a
minimum for each group: w = number(code) * scale - minimum, in float32, in this order.

`unpack` gives these parts of any number of blocks. Bit for bit what ggml computes (ggml-quants.c) and what gguf-py's
gguf.quants does, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from anychip.errors import ConfigError
from anychip.gguf.block_types import BY_NAME, RARE, BlockType

IQ4_NUMBERS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Of IQ4_NL and IQ4_XS: finer near zero, where most weights are."""
_FP4_HALVES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""e2m1, doubled."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """`exponents` are bytes b for 2^(b - 127), of types whose scales are such; their scales then belong to doubled
    numbers."""

    codes: Tensor  # [blocks, size] int8 or uint8
    scales: Tensor  # [blocks, groups] float32
    minima: Tensor | None = None  # [blocks, groups] float32
    numbers: tuple[int, ...] = ()
    exponents: Tensor | None = None  # [blocks, groups] uint8

    def integers(self) -> Tensor:
        """[blocks, size] int8: what scales multiply."""
        if not self.numbers:
            return self.codes.to(torch.int8)
        return torch.tensor(self.numbers, dtype=torch.int8)[self.codes.long()]

    def dequantized(self) -> Tensor:
        """[blocks, size] float32."""
        groups = self.scales.shape[1]
        wide = self.integers().float().view(len(self.codes), groups, -1) * self.scales.unsqueeze(-1)
        if self.minima is not None:
            wide = wide - self.minima.unsqueeze(-1)
        return wide.flatten(1)


def unpack(stored: BlockType, rows: Tensor) -> Blocks:
    """`rows`: uint8 [n, whole blocks' bytes]."""
    return _UNPACKED[stored.name](rows.reshape(-1, stored.nbytes))


def dequantize_rows(stored: BlockType, rows: Tensor) -> Tensor:
    """float32 [n, columns] of uint8 [n, whole blocks' bytes]. Raises ConfigError for a rare type without the package
    that knows its tables."""
    wide = _by_package(stored, rows) if stored.name in RARE else unpack(stored, rows).dequantized()
    return wide.view(len(rows), -1)


def _by_package(stored: BlockType, rows: Tensor) -> Tensor:
    try:
        gguf = import_module("gguf")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tensors of type {stored.name} are unpacked by the package gguf, which is not installed: pip install "
            "anychip[gguf], or take a file of another type"
        ) from error
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType(stored.number)))


def _half(blocks: Tensor, at: int) -> Tensor:
    """[blocks, 1] float32 of the float16 at byte `at`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _planes(held: Tensor, width: int, shifts: Sequence[int], mask: int) -> Tensor:
    """[blocks, bytes] hold, in each `width` bytes, several runs of `width` codes, one above the other in the bits."""
    parts = held.reshape(len(held), -1, 1, width) >> torch.tensor(shifts, dtype=torch.uint8).view(1, 1, -1, 1)
    return (parts & mask).flatten(1)


def _nibbles(held: Tensor, width: int) -> Tensor:
    return _planes(held, width, (0, 4), 15)


def _bits(held: Tensor) -> Tensor:
    """[blocks, 8 * bytes], lowest bits first."""
    return (held.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def _q4_0(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 2:], 16).to(torch.int8) - 8, _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), -_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[:, 6:], 16) | _bits(blocks[:, 2:6]) << 4
    return Blocks(codes.to(torch.int8) - 16, _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[:, 8:], 16) | _bits(blocks[:, 4:8]) << 4
    return Blocks(codes, _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Blocks:
    return Blocks(blocks[:, 2:].view(torch.int8), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Blocks:
    scales = blocks[:, :16]
    codes = _planes(blocks[:, 16:80], 32, (0, 2, 4, 6), 3)
    return Blocks(codes, _half(blocks, 80) * (scales & 15).float(), _half(blocks, 82) * (scales >> 4).float())


def _q3_k(blocks: Tensor) -> Blocks:
    low = _planes(blocks[:, 32:96], 32, (0, 2, 4, 6), 3).to(torch.int8)
    high = _planes(blocks[:, :32], 32, range(8), 1).to(torch.int8)
    scales = _nibbles(blocks[:, 96:104], 8) | _planes(blocks[:, 104:108], 4, (0, 2, 4, 6), 3) << 4
    # A set bit is not subtracted.
    return Blocks(low - 4 + 4 * high, _half(blocks, 108) * (scales.to(torch.int8) - 32).float())


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: eight of six bits each, in 12 bytes from byte 4; the last four have their upper two bits above
    those of the first four."""
    first, second, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, low & 15 | first >> 6 << 4), dim=1)
    minima = torch.cat((second & 63, low >> 4 | second >> 6 << 4), dim=1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()


def _q4_k(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 16:], 32), *_scales_and_minima(blocks))


def _q5_k(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[:, 48:], 32) | _planes(blocks[:, 16:48], 32, range(8), 1) << 4
    return Blocks(codes, *_scales_and_minima(blocks))


def _q6_k(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[:, :128], 64) | _planes(blocks[:, 128:192], 32, (0, 2, 4, 6), 3) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return Blocks(codes.to(torch.int8) - 32, _half(blocks, 208) * scales)


def _iq4_nl(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 2:], 16), _half(blocks, 0), numbers=IQ4_NUMBERS)


def _iq4_xs(blocks: Tensor) -> Blocks:
    low = _planes(blocks[:, 4:8], 1, (0, 4), 15)
    high = _planes(blocks[:, 2:4], 1, (0, 2, 4, 6), 3)
    scales = (low | high << 4).to(torch.int8) - 32
    return Blocks(_nibbles(blocks[:, 8:], 16), _half(blocks, 0) * scales.float(), numbers=IQ4_NUMBERS)


def _mxfp4(blocks: Tensor) -> Blocks:
    exponents = blocks[:, :1]
    scales = torch.ldexp(torch.ones(len(blocks), 1), exponents.to(torch.int32) - 128)
    return Blocks(_nibbles(blocks[:, 1:], 16), scales, numbers=_FP4_HALVES, exponents=exponents)


_UNPACKED: dict[str, Callable[[Tensor], Blocks]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip

assert _UNPACKED.keys() | RARE == {name for name, stored in BY_NAME.items() if not stored.is_plain}
