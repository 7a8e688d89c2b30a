"""Shapes of steps that are worth a graph, as many as the device's streams allow. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from anychip.plugin_api import TAPS, GraphLevel, ShapeKey, ShapePolicy, StepLimits
from anychip_ascend.streams import StreamBudget

_CAPTURED = ((), (TAPS,))
"""Features of decode steps that have graphs."""

_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_PIECE_TOKENS = (16, 64, 128, 256, 512)
_PIECES_SHARE = 2
_LAYERS_AT_MOST = 128
"""A set of pieces has a graph more than the model has layers; how many those are is not known here."""


class AscendShapes(ShapePolicy):
    """Decode steps, in which every row has one token, come in a few numbers of rows, each with a graph. Small steps
    with prompts are filled up to a few numbers of tokens and run in pieces; larger ones keep their sizes. Block tables
    are as wide as the longest request: the op reads of them what the lengths say."""

    def __init__(self, limits: StepLimits, level: GraphLevel, budget: StreamBudget) -> None:
        tapped = 2 if limits.taps else 1
        rows = [count for count in _ROWS if count < limits.max_num_reqs] + [limits.max_num_reqs]
        rows = [count for count in rows if count <= limits.max_num_tokens]
        rows = thinned(rows, budget.num_sizes() // tapped) if level >= GraphLevel.FULL else []
        pages = max(limits.max_pages, default=1)
        self._keys = [
            ShapeKey(num_tokens=count, num_reqs=count, num_samples=count, max_query_len=1, num_pages=pages)
            for count in rows
        ]
        self._pieces: list[int] = []
        if level >= GraphLevel.PIECEWISE:
            counts = [count for count in _PIECE_TOKENS if count <= limits.max_num_tokens]
            self._pieces = thinned(counts, budget.num_sizes(_LAYERS_AT_MOST * _PIECES_SHARE * tapped))

    def keys(self) -> Sequence[ShapeKey]:
        return self._keys

    def pieces(self) -> Sequence[int]:
        return self._pieces

    def bucket(
        self,
        *,
        num_tokens: int,
        num_reqs: int,
        num_samples: int,
        max_query_len: int,
        num_pages: int,
        features: tuple[str, ...],
    ) -> ShapeKey:
        if max_query_len == 1 and features in _CAPTURED:
            for key in self._keys:
                if num_reqs <= key.num_reqs and num_pages <= key.num_pages:
                    return replace(key, features=features) if features else key
        return super().bucket(
            num_tokens=next((count for count in self._pieces if count >= num_tokens), num_tokens),
            num_reqs=num_reqs,
            num_samples=num_samples,
            max_query_len=max_query_len,
            num_pages=num_pages,
            features=features,
        )


def thinned(sizes: Sequence[int], most: int) -> list[int]:
    """At most so many of ascending sizes, spread evenly; the largest is among them."""
    if most <= 0:
        return []
    if len(sizes) <= most:
        return list(sizes)
    if most == 1:
        return [sizes[-1]]
    step = (len(sizes) - 1) / (most - 1)
    return [sizes[round(index * step)] for index in range(most)]
