"""transformers' eager attention, which also notes the greatest keys and values: scales of a KV cache come of them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

WATCHED = "anychip-watched"
"""Its name in transformers' registry. Eager, because that form alone has every model's caps and sinks."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, Any]:
    """Keys [1, num_kv_heads, num_tokens, head_dim] come rotated, as a cache holds them."""
    for name, given in (("greatest_key", key), ("greatest_value", value)):
        found = given.float().abs().amax(dim=(0, 2, 3))
        before = getattr(module, name, None)
        setattr(module, name, found if before is None else torch.maximum(before, found))
    eager = sys.modules[type(module).__module__].eager_attention_forward
    result: tuple[Tensor, Any] = eager(module, query, key, value, attention_mask, **others)
    return result


def greatest(layer: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """By attention module of a decoder layer, the greatest magnitudes of keys and values, [num_kv_heads] each."""
    return {
        name: (module.greatest_key, module.greatest_value)
        for name, module in layer.named_modules()
        if isinstance(getattr(module, "greatest_key", None), Tensor)
    }


AttentionInterface.register(WATCHED, attention)
AttentionMaskInterface.register(WATCHED, eager_mask)
