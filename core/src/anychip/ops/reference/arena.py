"""The arrays of a step as tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anychip.plugin_api import Section


def arena_views(arena: Tensor, sections: Mapping[str, Section]) -> dict[str, Tensor]:
    """Views by name of the arrays that lie in an arena, uint8 [nbytes], wherever that is."""
    return {
        name: arena[s.offset : s.offset + s.nbytes].view(getattr(torch, s.dtype)).view(s.shape)
        for name, s in sections.items()
    }
