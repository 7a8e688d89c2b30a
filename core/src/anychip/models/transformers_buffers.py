"""What a transformers model on the meta device lacks beside its weights."""

from __future__ import annotations

import torch


def fill_buffers(model: object, device: torch.device | str) -> None:
    """Rotary frequencies and their like: made by the library's own initialisation."""
    for module in model.modules():  # type: ignore[attr-defined]
        on_meta = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in on_meta:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if on_meta:
            model._init_weights(module)  # type: ignore[attr-defined]
