"""What canonical parts of a quantized matrix stand for: the arithmetic of plugin_api.QuantScheme, in float32.

Plain tensor operations only, on whatever device the parts are, without a look at the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.plugin_api import QuantScheme, implied_zero


def dequantize(
    scheme: QuantScheme,
    values: Tensor,
    scale: Tensor,
    *,
    global_scale: Tensor | None = None,
    super_scale: Tensor | None = None,
    zero: Tensor | None = None,
    minimum: Tensor | None = None,
    super_minimum: Tensor | None = None,
    codebook: Tensor | None = None,
) -> Tensor:
    """[rows, columns] float32 of canonical parts. Scales, global ones and zeros may come by row too, [rows, groups] and
    [rows, 1]. `codebook` is the scheme's as a tensor, for those who must not make one at each call."""
    wide = stored_numbers(scheme, values, codebook)
    if zero is not None:
        wide = wide - _spread(scheme, zero.float(), values)
    elif offset := implied_zero(scheme):
        wide = wide - offset
    scales = scale_numbers(scheme, scale, global_scale if super_scale is None else super_scale)
    wide = wide * _spread(scheme, scales, values)
    return wide if minimum is None else wide - _spread(scheme, scale_numbers(scheme, minimum, super_minimum), values)


def stored_numbers(scheme: QuantScheme, values: Tensor, codebook: Tensor | None = None) -> Tensor:
    """The float32 numbers that canonical values stand for, before zeros and scales."""
    if scheme.values == "fp4_e2m1":
        exponent, odd = (values >> 1) & 3, (values & 1).float()
        # Half steps below one, then two numbers to each power of two: 0 0.5 1 1.5 2 3 4 6.
        magnitude = torch.where(exponent == 0, 0.5 * odd, (1 + 0.5 * odd) * (1 << exponent.int()) * 0.5)
        return torch.where(values >= 8, -magnitude, magnitude)
    if scheme.codebook:
        table = values.new_tensor(scheme.codebook, dtype=torch.float32) if codebook is None else codebook
        return table[values.long()]
    return values.float()


def scale_numbers(scheme: QuantScheme, scale: Tensor, upper: Tensor | None = None) -> Tensor:
    """float32 scales of canonical ones, or minima, in their shape. `upper`: the global scale or super-scales."""
    wide = _powers_of_two(scale) if scheme.scale_format == "e8m0" else scale.float()
    if upper is None:
        return wide
    if scheme.super_group_size is None:
        return wide * upper
    assert scheme.group_size is not None
    repeats = scheme.super_group_size // scheme.group_size
    return wide * upper.float().repeat_interleave(repeats, dim=1)[:, : wide.shape[1]]


def _powers_of_two(exponents: Tensor) -> Tensor:
    """2^(b - 127) of bytes: float32's own exponent bits, where it is no subnormal. Not every device knows the dtype."""
    normal = (exponents.to(torch.int32) << 23).view(torch.float32)
    return torch.where(exponents == 0, 2.0**-127, normal)


def _spread(scheme: QuantScheme, grouped: Tensor, values: Tensor) -> Tensor:
    """Scales or zeros so that they meet every element's own."""
    rows, columns = values.shape
    wide = grouped.view(-1, 1) if grouped.dim() == 1 else grouped
    size = scheme.group_size
    if size is None:
        return wide
    if scheme.scales == "block" and len(wide) != rows:
        wide = wide.repeat_interleave(size, dim=0)[:rows]
    return wide.repeat_interleave(size, dim=1)[:, :columns]
