"""A step's host arrays on their way to the devices: one array of integers and one of floats, whatever a step holds.

XLA cannot read bytes as another dtype, so an arena is not copied as bytes. Every array of a step is of four-byte
integers, and the floats of a sampling stand before its integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import Section


def host_arrays(arena: np.ndarray, sections: Mapping[str, Section]) -> list[Tensor]:
    """Copies of what an arena holds: int32 [words], and float32 [words] where it has floats. Core writes into the arena
    again while an upload may still read."""
    words = torch.from_numpy(arena[: _end(sections)].view(np.int32).copy())
    end = _floats_end(sections)
    return [words] if not end else [words, torch.from_numpy(arena[:end].view(np.float32).copy())]


def device_views(arrays: Sequence[Tensor], sections: Mapping[str, Section]) -> dict[str, Tensor]:
    """What host_arrays made, on the devices, as the arena's arrays by name: for a traced function."""
    found = {}
    for name, section in sections.items():
        words = arrays[1] if section.dtype == "float32" else arrays[0]
        start = section.offset // 4
        found[name] = words[start : start + section.nbytes // 4].view(section.shape)
    return found


def _floats_end(sections: Mapping[str, Section]) -> int:
    return max((s.offset + s.nbytes for s in sections.values() if s.dtype == "float32"), default=0)


def _end(sections: Mapping[str, Section]) -> int:
    return max(s.offset + s.nbytes for s in sections.values())
