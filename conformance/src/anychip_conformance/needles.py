"""Keys of long contexts that are all needed: a few places, the last and those where something changes among them, have
equal weight, and the others next to none. Whoever misses a single one gives another result."""

from __future__ import annotations

import numpy as np

_LOGIT = 24.0
"""A needle's score. What a hundred thousand other keys weigh together is lost beside it."""
_NOISE = 0.03
_TRAP = 1000.0
"""Value of keys that no query sees, and that would outweigh everything."""


def places(context: int, window: int | None, queries: int) -> np.ndarray:
    """Needles among `context` keys, all of which every one of the queries behind them sees."""
    first = 0 if window is None else max(0, context + queries - window)
    edges = [edge + step for edge in (128, 256, 1024, 4096, 8192, 32_768, 65_536, 131_072) for step in (-1, 0)]
    found = {first, first + 1, (first + context) // 2, context - 2, context - 1, *edges}
    return np.array(sorted(place for place in found if first <= place < context), dtype=np.int64)


def direction(head_dim: int, scale: float) -> np.ndarray:
    """The needles' key, and the query that finds them."""
    signs = np.where(np.arange(head_dim) % 3 == 0, -1.0, 1.0)
    return signs * np.sqrt(_LOGIT / (scale * head_dim))


def tokens(
    rng: np.random.Generator, context: int, queries: int, heads: int, head_dim: int, scale: float, window: int | None
) -> np.ndarray:
    """Keys and values of a context, [2, context, heads, head_dim]."""
    found = rng.standard_normal((2, context, heads, head_dim), dtype=np.float32)
    found[0] *= _NOISE
    needle = direction(head_dim, scale)
    found[0, places(context, window, queries)] = needle
    if window is not None:
        passed = max(0, context + 1 - window)
        found[0, :passed], found[1, :passed] = 1.5 * needle, _TRAP
    return found
