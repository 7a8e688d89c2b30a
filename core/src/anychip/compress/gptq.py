"""GPTQ: columns are rounded one after the other, and those to come make up for the error of those before.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
Columns are taken in the order of how much their inputs weigh; their groups and scales stay those of their places, so
the stored form is the usual one (compressed-tensors' actorder "static").
"""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.compress.rounding import Rounded, scales_of, stored
from anychip.ops.reference.canonical import stored_numbers
from anychip.plugin_api import INT4_ZERO, QuantScheme

_BLOCK = 128
"""Columns between two updates of all that follow."""

_DAMPING = 0.01
"""Of the mean of the diagonal, added to it: inputs that hardly vary must not be divided by."""


class Moments:
    """Sum of x x^T over the inputs [num_tokens, columns] of a product, and each column's greatest magnitude, in
    float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros((columns, columns), device=device)
        self.greatest = torch.zeros(columns, device=device)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        wide = inputs.flatten(0, -2).float()
        self.sum.addmm_(wide.T, wide)
        self.greatest = torch.maximum(self.greatest, wide.abs().amax(dim=0))
        self.count += len(wide)

    def divided(self, factors: Tensor) -> Moments:
        """Of the inputs divided by factors [columns]."""
        other = Moments(len(factors), factors.device)
        other.sum = self.sum / factors / factors.unsqueeze(1)
        other.greatest, other.count = self.greatest / factors, self.count
        return other


def gptq(weight: Tensor, moments: Tensor, scheme: QuantScheme) -> Rounded:
    """Weights [rows, columns] rounded so that W x changes least over inputs of these moments [columns, columns]."""
    wide, scale = weight.float().clone(), scales_of(weight, scheme)
    columns = wide.shape[1]
    by_column = scale.unsqueeze(-1).expand(-1, columns) if scheme.group_size is None else scale.repeat_interleave(
        scheme.group_size, dim=1
    )  # fmt: skip
    order = moments.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(moments[order][:, order])
    wide, by_column = wide[:, order], by_column[:, order]
    values = torch.empty_like(wide, dtype=stored(wide[:, :1], by_column[:, :1], scheme).dtype)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty_like(wide[:, start:stop])
        for at in range(start, stop):
            values[:, at] = stored(wide[:, at], by_column[:, at], scheme)
            error = (wide[:, at] - _number(values[:, at], scheme) * by_column[:, at]) / upper[at, at]
            wide[:, at + 1 : stop] -= error.unsqueeze(1) * upper[at, at + 1 : stop]
            errors[:, at - start] = error
        wide[:, stop:] -= errors @ upper[start:stop, stop:]
    return Rounded(scheme, values[:, order.argsort()], scale)


def _number(values: Tensor, scheme: QuantScheme) -> Tensor:
    """What stored values stand for, before their scale."""
    zero = INT4_ZERO if scheme.values == "int4" else 0
    return stored_numbers(scheme, values) - zero


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of damped moments, row i of which says how columns behind i make up for
    an error in i. A column without inputs counts as one of its own: any value serves there."""
    damped = moments.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal.add_(_DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
