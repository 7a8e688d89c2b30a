"""What an adapter says of the weights under it: those that it was saved with, and DoRA's magnitudes.

DoRA (Liu et al., arXiv 2402.09353): each row of W + scale * B A is brought to a magnitude of its own. Beside the base
that is a gain for each output feature: magnitude / |row|, which is worked out once, as an adapter is loaded.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anychip.errors import AdapterRefused
from anychip.plugin_api import LowRank
from anychip.weights.adapter import BaseWeights, LoadedAdapter

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_base(adapter: LoadedAdapter, base: BaseWeights) -> None:
    """Raises AdapterRefused where weights that PEFT has saved beside the adapter are not the base's: it does so where
    an embedding or a head is adapted."""
    for name, saved in adapter.base.items():
        held = _read(base, name)
        if held.shape != saved.shape or not torch.equal(held, saved.to(held.dtype)):
            raise AdapterRefused(
                f"the adapter was saved with a {name} that is not the model's; it was trained on another base"
            )


def with_gains(adapter: LoadedAdapter, base: BaseWeights) -> LoadedAdapter:
    """The adapter with DoRA's gains, and with what keeps them off a bias. Raises AdapterRefused."""
    changed = dict(adapter.modules)
    for module, magnitude in adapter.magnitudes.items():
        matrices = changed.get(module)
        if matrices is None:
            raise AdapterRefused(f"the adapter has magnitudes of {module}, and no matrices; it is not whole")
        gain = gain_of(_read(base, f"{module}.weight"), matrices, magnitude, module)
        bias = f"{module}.bias"
        shift = (1 - gain) * base.read(bias).float() if bias in base.names else None
        changed[module] = replace(matrices, gain=gain, shift=shift)
    return replace(adapter, modules=changed)


def gain_of(weight: Tensor, matrices: LowRank, magnitude: Tensor, module: str) -> Tensor:
    """[out_features] float32: magnitude / |W + scale * B A| by row. The matrix is never made: its rows' squares are
    |w|^2 + 2 scale b (A w) + scale^2 b (A A^T) b."""
    down, up = matrices.down.double(), matrices.up.double()
    if not weight.is_floating_point() or weight.shape != (up.shape[0], down.shape[1]):
        raise AdapterRefused(
            f"{module}: DoRA needs the base's plain matrix {[up.shape[0], down.shape[1]]}; the checkpoint has "
            f"{list(weight.shape)} of {weight.dtype}"
        )
    if magnitude.numel() != len(weight):
        raise AdapterRefused(f"{module}: {magnitude.numel()} magnitudes for {len(weight)} rows; it is of another base")
    scale = matrices.scale
    squares = torch.empty(len(weight), dtype=torch.float64)
    for first in range(0, len(weight), _ROWS):  # a head's rows in float64 would take gigabytes
        rows, own = weight[first : first + _ROWS].double(), up[first : first + _ROWS]
        square = rows.square().sum(dim=1) + 2 * scale * ((rows @ down.T) * own).sum(dim=1)
        squares[first : first + _ROWS] = square + scale**2 * ((own @ (down @ down.T)) * own).sum(dim=1)
    return (magnitude.flatten().double() / squares.clamp(min=torch.finfo(torch.float64).tiny).sqrt()).float()


_ROWS = 4096


def _read(base: BaseWeights, name: str) -> Tensor:
    if name == _HEAD and name not in base.names:  # they are tied
        name = _EMBEDDING
    if name not in base.names:
        raise AdapterRefused(f"the adapter needs the model's {name}, and the checkpoint has no tensor of this name")
    return base.read(name)
