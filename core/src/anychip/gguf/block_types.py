"""How a GGUF tensor's values are stored: the types' numbers, names and sizes. weights/blocks.py reads their bits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    """`size` values along a tensor's rows lie together in `nbytes` bytes."""

    number: int
    name: str
    size: int = 1
    nbytes: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether values are floats as they are."""
        return self.name in ("F32", "F16", "BF16", "F64")


_SUPER = 256
"""Values of a k-quant's block."""

BLOCK_TYPES: dict[int, BlockType] = {
    each.number: each
    for each in (
        BlockType(0, "F32", 1, 4),
        BlockType(1, "F16", 1, 2),
        BlockType(30, "BF16", 1, 2),
        BlockType(28, "F64", 1, 8),
        BlockType(2, "Q4_0", 32, 18),
        BlockType(3, "Q4_1", 32, 20),
        BlockType(6, "Q5_0", 32, 22),
        BlockType(7, "Q5_1", 32, 24),
        BlockType(8, "Q8_0", 32, 34),
        BlockType(10, "Q2_K", _SUPER, 84),
        BlockType(11, "Q3_K", _SUPER, 110),
        BlockType(12, "Q4_K", _SUPER, 144),
        BlockType(13, "Q5_K", _SUPER, 176),
        BlockType(14, "Q6_K", _SUPER, 210),
        BlockType(20, "IQ4_NL", 32, 18),
        BlockType(23, "IQ4_XS", _SUPER, 136),
        BlockType(39, "MXFP4", 32, 17),
        BlockType(16, "IQ2_XXS", _SUPER, 66),
        BlockType(17, "IQ2_XS", _SUPER, 74),
        BlockType(22, "IQ2_S", _SUPER, 82),
        BlockType(18, "IQ3_XXS", _SUPER, 98),
        BlockType(21, "IQ3_S", _SUPER, 110),
        BlockType(19, "IQ1_S", _SUPER, 50),
        BlockType(29, "IQ1_M", _SUPER, 56),
        BlockType(34, "TQ1_0", _SUPER, 54),
        BlockType(35, "TQ2_0", _SUPER, 66),
        BlockType(40, "NVFP4", 64, 36),
    )
}
"""By the number in a file."""

BY_NAME: dict[str, BlockType] = {each.name: each for each in BLOCK_TYPES.values()}

RARE: frozenset[str] = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "NVFP4"}
)
"""Types of which no scheme holds the values: the package `gguf` unpacks them, and they become int8 at load."""
