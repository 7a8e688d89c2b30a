"""What a transformers model on the meta device lacks beside its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def fill_buffers(model: PreTrainedModel, device: torch.device | str) -> dict[str, Tensor]:
    """Rotary frequencies and their like: made by the library's own initialisation. Returns those that a checkpoint may
    hold, by name."""
    persistent = dict[str, Tensor]()
    fills: dict[str, Any] = {}  # by name of a model within the model, what initialises its modules
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            fills[prefix] = module._init_weights
        on_meta = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in on_meta:
            buffer: Any = module._buffers[name]
            made = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
            module._buffers[name] = made
            if name not in module._non_persistent_buffers_set:
                persistent[f"{prefix}.{name}" if prefix else name] = made
        if on_meta:
            inner = max((name for name in fills if f"{prefix}.".startswith(f"{name}.") or not name), key=len)
            fills[inner](module)
    return persistent
