"""Copies and clearings of blocks as a program of a fixed shape: a turn takes so many, the rest come in more turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from anychip.plugin_api import NULL_BLOCK

EDITS_AT_ONCE = 16
"""Blocks that one run of the program changes. A step that changes more runs it again."""


def turns(copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """(targets, sources, cleared) of each run, all EDITS_AT_ONCE long: block targets[i] becomes what sources[i] was
    before the run, or zeros where cleared[i] is 1. Targets of one run differ, but for the null block, which is padding.
    Copies take effect in order, and before the clearing."""
    changes: dict[int, int | None] = {}

    def taken() -> tuple[list[int], list[int], list[int]]:
        padding = EDITS_AT_ONCE - len(changes)
        targets = [*changes, *[NULL_BLOCK] * padding]
        sources = [NULL_BLOCK if source is None else source for source in changes.values()] + [NULL_BLOCK] * padding
        cleared = [int(source is None) for source in changes.values()] + [0] * padding
        changes.clear()
        return targets, sources, cleared

    for source, target in [*copies, *((None, block) for block in zeros)]:
        if len(changes) == EDITS_AT_ONCE and target not in changes:
            yield taken()
        # What a source holds by now is what an earlier copy of this run put there.
        changes[target] = changes.get(source, source) if source is not None else None
    if changes:
        yield taken()


def edited(cache: Tensor, targets: Tensor, sources: Tensor, cleared: Tensor) -> Tensor:
    """One run on a cache [num_blocks, ...]; the others int32 [EDITS_AT_ONCE]."""
    held = cache.index_select(0, sources.long())
    shape = (-1,) + (1,) * (cache.dim() - 1)
    return cache.index_copy(0, targets.long(), torch.where(cleared.view(shape) > 0, torch.zeros_like(held), held))
