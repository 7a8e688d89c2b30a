"""Quantization as kernels see it: one canonical form per scheme, whatever container the checkpoint used.

A weight is w = (q - zero) * scale. Core turns GPTQ, AWQ, FP8 and compressed-tensors files, and plain weights that
are quantized at load, into the parts that LinearKernel.load and FusedMoE.load document; kernels pack those as they
like. Sources: Frantar et al., "GPTQ", 2022; Lin et al., "AWQ", 2023; Micikevicius et al., "FP8 Formats for Deep
Learning", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SchemeName = Literal["int8", "int4", "fp8", "int8-w8a8"]

SCHEMES: frozenset[str] = frozenset({"int8", "int4", "fp8", "int8-w8a8"})
"""What the reference kernels serve: every platform starts from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """How a product's weights are stored, and what happens to its activations. The parts in canonical form:

    | part | dtype | shape |
    |---|---|---|
    | values | int8; uint8 0 to 15, one a byte, for int4; float8_e4m3fn | [rows, in_features] |
    | `.scale` | float32 | tensor: [1]; channel: [rows]; group: [rows, groups]; block: [row blocks, column blocks] |
    | `.zero`, with zero_points | uint8 | as `.scale` |
    | `.input_scale`, with static activations | float32 | [1] |

    Without zero_points the zero of int4 is 8 and that of others 0. `group_size` columns share a scale, and in
    "block" as many rows do; the last group may be shorter.
    """

    name: SchemeName
    scales: Literal["tensor", "channel", "group", "block"]
    group_size: int | None = None
    zero_points: bool = False
    activations: Literal["plain", "token", "group", "static"] = "plain"
    """plain: not quantized. Otherwise to the weights' dtype, symmetrically: with a scale per token, per token and
    group, or the checkpoint's one scale."""


INT4_ZERO = 8
"""The zero of int4 values without zero points."""

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""
