"""Shapes of steps that are worth a graph, as many as the device's streams allow. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plugin_api import CapturedShapes, GraphLevel, ShapeKey, StepLimits
from anychip_ascend.streams import StreamBudget

_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_PIECE_TOKENS = (16, 64, 128, 256, 512)
_PIECES_SHARE = 2
_LAYERS_AT_MOST = 128
"""A set of pieces has a graph more than the model has layers; how many those are is not known here."""


class AscendShapes(CapturedShapes):
    """As many graphs as the device's streams allow, one for each of a few numbers of rows. Block tables are as wide as
    the longest request: the op reads of them what the lengths say."""

    def __init__(self, limits: StepLimits, level: GraphLevel, budget: StreamBudget) -> None:
        tapped = 2 if limits.taps else 1
        rows = [count for count in _ROWS if count < limits.max_num_reqs] + [limits.max_num_reqs]
        rows = [count for count in rows if count <= limits.max_num_tokens]
        rows = thinned(rows, budget.num_sizes() // tapped) if level >= GraphLevel.FULL else []
        widest = max(limits.max_pages, default=1)
        keys = [
            ShapeKey(num_tokens=count, num_reqs=count, num_samples=count, max_query_len=1, num_pages=widest)
            for count in rows
        ]
        pieces: list[int] = []
        if level >= GraphLevel.PIECEWISE:
            counts = [count for count in _PIECE_TOKENS if count <= limits.max_num_tokens]
            pieces = thinned(counts, budget.num_sizes(_LAYERS_AT_MOST * _PIECES_SHARE * tapped))
        super().__init__(keys, pieces)


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
