"""Moves size from what a norm gives to the matrices that read it, or back, so that rounding costs less.

A norm's output divided by a vector, and the matrices' columns multiplied by it, give the same products: the division
goes into the norm's own weight. Sources: Lin et al., "AWQ: Activation-aware Weight Quantization", 2023; Xiao et al.,
"SmoothQuant", 2022.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from anychip.compress.by_layer import CalibratedLayer
from anychip.compress.gptq import Moments
from anychip.compress.rounding import round_to_nearest
from anychip.plugin_api import QuantScheme

_STEPS = 20
"""Exponents from 0 on, below 1, of which AWQ takes the one that costs least."""

_LEAST = 1e-4
"""Of a factor: a column that is never fed keeps a size."""

_SAME = 0.02
"""Relative difference up to which a layer's output counts as unchanged: bfloat16's rounding shows in it."""

_BALANCE = 0.5
"""SmoothQuant's exponent: activations and weights share what is hard to round."""


@torch.no_grad()
def smooth(layer: CalibratedLayer, names: Collection[str], scheme: QuantScheme, *, awq: bool) -> dict[str, Tensor]:
    """Smooths the inputs of a layer's linear layers as far as norms give them to those of `names` alone, and returns
    the norms' changed parameters by their names in the checkpoint. The layer computes what it did."""
    changed: dict[str, Tensor] = {}
    for norm_name, linears in layer.seen.feeds.items():
        if not all(name in names for name in linears):
            continue
        norm, moments = layer.layer.get_submodule(norm_name), layer.seen.moments[linears[0]]
        weights = [layer.linears[name].weight for name in linears]
        factors = awq_factors(weights, moments, scheme) if awq else smoothquant_factors(weights, moments)
        before, held = layer.first_output(), [p.clone() for p in (*norm.parameters(), *weights)]
        divide_output(norm, factors)
        for weight in weights:
            weight.copy_(weight.float() * factors)
        after = layer.first_output()
        if (after - before).norm() > _SAME * before.norm():  # something else reads the norm's output too
            for parameter, plain in zip((*norm.parameters(), *weights), held, strict=True):
                parameter.copy_(plain)
            continue
        for name in linears:
            layer.seen.moments[name] = moments.divided(factors)
        changed |= {layer.stored_name(f"{norm_name}.{leaf}"): p.data for leaf, p in norm.named_parameters()}
    return changed


def awq_factors(weights: Sequence[Tensor], moments: Moments, scheme: QuantScheme) -> Tensor:
    """Factors [columns] for matrices [rows, columns] that read one input: powers of how large the input's columns are,
    of the power with which the rounded products err least."""
    size = (moments.sum.diagonal() / max(moments.count, 1)).sqrt()
    best, least = torch.ones_like(size), torch.tensor(float("inf"))
    for step in range(_STEPS):
        factors = size.pow(step / _STEPS).clamp(min=_LEAST)
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = sum((_cost(weight.float(), factors, moments.sum, scheme) for weight in weights), torch.zeros(()))
        if error < least:
            best, least = factors, error
    return best


def _cost(weight: Tensor, factors: Tensor, moments: Tensor, scheme: QuantScheme) -> Tensor:
    error = round_to_nearest(weight * factors, scheme).dequantize() / factors - weight
    return ((error @ moments) * error).sum().cpu()


def smoothquant_factors(weights: Sequence[Tensor], moments: Moments) -> Tensor:
    """Factors [columns] that leave the greatest magnitudes of input and matrices alike, column by column."""
    ours = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    theirs = moments.greatest
    factors = theirs.clamp(min=_LEAST).pow(_BALANCE) / ours.clamp(min=_LEAST).pow(1 - _BALANCE)
    return torch.where((ours > 0) & (theirs > 0), factors, 1.0)


@torch.no_grad()
def divide_output(norm: nn.Module, factors: Tensor) -> None:
    """Divides a norm's output by factors [columns], through its weight and bias. A norm that multiplies by one plus its
    weight gives something where the weight is zero."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(norm, "bias", None)
    held, held_bias = weight.clone(), None if bias is None else bias.clone()
    probe = torch.ones((1, len(factors)), device=weight.device, dtype=weight.dtype)
    probe[:, ::2] = 2.0  # a norm that takes the mean away would give nothing for ones alone
    weight.zero_()
    if bias is not None:
        bias.zero_()
    offset = 1.0 if norm(probe).abs().max() > 0 else 0.0
    weight.copy_((held.float() + offset) / factors - offset)
    if bias is not None and held_bias is not None:
        bias.copy_(held_bias.float() / factors)
