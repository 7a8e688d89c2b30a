"""What the bits of GGUF's block types mean. A block is codes, a scale for each group of them, and in some types a
minimum for each group: w = number(code) * scale - minimum, in float32, in this order.

`unpack` gives these parts of any number of blocks in the form that the file has them in: scales and minima are float16,
or bytes that a float16 number of the block multiplies. Bit for bit what ggml computes (ggml-quants.c) and
what gguf-py's gguf.quants does, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from anychip.errors import ConfigError
from anychip.gguf.block_types import BY_NAME, RARE, BlockType
from anychip.plugin_api.quantization import IQ4

_IQ4_NUMBERS = tuple(map(int, IQ4))
_FP4_HALVES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""e2m1, doubled."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """`offset` is taken off every code. `scale` and `minimum` are float16, or int8 that `super_scale` and
    `super_minimum` multiply, or of `scale` uint8: b for 2^(b - 127), then of doubled numbers."""

    codes: Tensor  # [blocks, size] uint8, of Q8_0 int8
    scale: Tensor  # [blocks, groups]
    super_scale: Tensor | None = None  # [blocks, 1] float16
    minimum: Tensor | None = None  # [blocks, groups]
    super_minimum: Tensor | None = None  # [blocks, 1] float16
    offset: int = 0
    numbers: tuple[int, ...] = ()

    @property
    def scales(self) -> Tensor:
        """[blocks, groups] float32."""
        if self.scale.dtype == torch.uint8:
            return torch.ldexp(torch.ones_like(self.scale, dtype=torch.float32), self.scale.to(torch.int32) - 128)
        return _product(self.scale, self.super_scale)

    @property
    def minima(self) -> Tensor | None:
        """[blocks, groups] float32."""
        return None if self.minimum is None else _product(self.minimum, self.super_minimum)

    def integers(self) -> Tensor:
        """[blocks, size] int8: what scales multiply."""
        if self.numbers:
            return torch.tensor(self.numbers, dtype=torch.int8)[self.codes.long()]
        return self.codes.view(torch.int8) - self.offset if self.offset else self.codes.view(torch.int8)

    def dequantized(self) -> Tensor:
        """[blocks, size] float32."""
        scales, minima = self.scales, self.minima
        wide = self.integers().float().view(*scales.shape, -1) * scales.unsqueeze(-1)
        if minima is not None:
            wide = wide - minima.unsqueeze(-1)
        return wide.flatten(1)


def _product(each: Tensor, upper: Tensor | None) -> Tensor:
    return each.float() if upper is None else upper.float() * each.float()


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
    """[blocks, 1]: the float16 at byte `at`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _planes(held: Tensor, width: int, shifts: Sequence[int], mask: int, up: int = 0) -> Tensor:
    """[blocks, bytes] hold, in each `width` bytes, several runs of `width` codes, one above the other in the bits;
    the codes, `up` bits higher. Eight bytes are worked on at once: loading is bound by this."""
    eight = width % 8 == 0
    runs = held.reshape(len(held), -1, 1, width)
    wide = runs.contiguous().view(torch.int64) if eight else runs
    bits = mask * 0x0101010101010101 if eight else mask
    parts = [(wide >> shift if shift else wide) & bits for shift in shifts]
    codes = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    return (codes << up if up else codes).view(torch.uint8).flatten(1)


def _nibbles(held: Tensor, width: int) -> Tensor:
    return _planes(held, width, (0, 4), 15)


def _bits(held: Tensor, up: int) -> Tensor:
    """[blocks, 8 * bytes], lowest bits first, `up` bits higher."""
    return (held.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1) << up


def _q4_0(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 2:], 16), _half(blocks, 0), offset=8)


def _q4_1(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), minimum=-_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[:, 6:], 16).bitwise_or_(_bits(blocks[:, 2:6], 4))
    return Blocks(codes, _half(blocks, 0), offset=16)


def _q5_1(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[:, 8:], 16).bitwise_or_(_bits(blocks[:, 4:8], 4))
    return Blocks(codes, _half(blocks, 0), minimum=-_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Blocks:
    return Blocks(blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Blocks:
    scales = blocks[:, :16]
    codes = _planes(blocks[:, 16:80], 32, (0, 2, 4, 6), 3)
    scale, minimum = (scales & 15).view(torch.int8), (scales >> 4).view(torch.int8)
    return Blocks(codes, scale, _half(blocks, 80), minimum, _half(blocks, 82))


def _q3_k(blocks: Tensor) -> Blocks:
    codes = _planes(blocks[:, 32:96], 32, (0, 2, 4, 6), 3)
    codes = codes.bitwise_or_(_planes(blocks[:, :32], 32, range(8), 1, up=2))
    scales = _nibbles(blocks[:, 96:104], 8) | _planes(blocks[:, 104:108], 4, (0, 2, 4, 6), 3, up=4)
    # A set upper bit is not subtracted.
    return Blocks(codes, scales.view(torch.int8) - 32, _half(blocks, 108), offset=4)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of Q4_K and Q5_K: eight of six bits each, in 12 bytes from byte 4; the last four have their upper two bits above
    those of the first four. Scales, the number that multiplies them, and minima likewise."""
    first, second, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, low & 15 | first >> 6 << 4), dim=1)
    minima = torch.cat((second & 63, low >> 4 | second >> 6 << 4), dim=1)
    return scales.view(torch.int8), _half(blocks, 0), minima.view(torch.int8), _half(blocks, 2)


def _q4_k(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 16:], 32), *_scales_and_minima(blocks))


def _q5_k(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[:, 48:], 32).bitwise_or_(_planes(blocks[:, 16:48], 32, range(8), 1, up=4))
    return Blocks(codes, *_scales_and_minima(blocks))


def _q6_k(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[:, :128], 64).bitwise_or_(_planes(blocks[:, 128:192], 32, (0, 2, 4, 6), 3, up=4))
    return Blocks(codes, blocks[:, 192:208].contiguous().view(torch.int8), _half(blocks, 208), offset=32)


def _iq4_nl(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 2:], 16), _half(blocks, 0), numbers=_IQ4_NUMBERS)


def _iq4_xs(blocks: Tensor) -> Blocks:
    low = _planes(blocks[:, 4:8], 1, (0, 4), 15)
    scales = low | _planes(blocks[:, 2:4], 1, (0, 2, 4, 6), 3, up=4)
    return Blocks(_nibbles(blocks[:, 8:], 16), scales.view(torch.int8) - 32, _half(blocks, 0), numbers=_IQ4_NUMBERS)


def _mxfp4(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 1:], 16), blocks[:, :1].contiguous(), numbers=_FP4_HALVES)


_UNPACKED: dict[str, Callable[[Tensor], Blocks]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip

assert _UNPACKED.keys() | RARE == {name for name, stored in BY_NAME.items() if not stored.is_plain}
