"""Rotary embeddings of the library whose frequencies follow the longest request of a batch, held at the served length:
a cached key cannot turn with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_MOVING = ("dynamic", "longrope")


def hold_still(model: nn.Module, served: int | None) -> None:
    """Gives each such embedding what the library computes for a batch whose longest request has `served` tokens; None
    only keeps them from moving."""
    for module, layer_type, kind in _moving(model):
        named = {} if layer_type is None else {"layer_type": layer_type}
        prefix = "" if layer_type is None else f"{layer_type}_"
        # Up to the trained length, dynamic ones are what the class itself begins with.
        if served is not None and (kind != "dynamic" or served > module.original_max_seq_len):
            buffer = getattr(module, f"{prefix}inv_freq")
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, buffer.device, seq_len=served, **named)
            buffer.copy_(frequencies)
        if layer_type is None:
            module.rope_type = "default"
        else:
            module.rope_type = {**module.rope_type, layer_type: "default"}


def _moving(model: nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """Modules, the layers' type where an embedding serves several, and the kind of its frequencies."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            kinds = {None: kinds}
        if isinstance(kinds, dict):
            yield from ((module, layer, kind) for layer, kind in kinds.items() if kind in _MOVING)
