"""Decisions for a model that drafts, made in the worker: what a step of the target changes for it, and its own passes.

Its tables have `num_groups` groups that are all alike, and follow the blocks of the target's group `group`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anychip.step_messages import NewRow, StepDecision


def new_blocks(decision: StepDecision, group: int) -> np.ndarray:
    """(slot, group, place, block) of a group's new blocks. [num_changes, 4] int32"""
    changes = np.frombuffer(decision.new_blocks, dtype=np.int32).reshape(-1, 4)
    mine: np.ndarray = changes[changes[:, 1] == group]
    return mine


def changed(
    entering: Sequence[NewRow], changes: np.ndarray, finished: Sequence[int], *, num_groups: int
) -> StepDecision:
    """A step without rows. `changes` as new_blocks has them."""
    blocks = np.tile(changes, (num_groups, 1))
    blocks[:, 1] = np.arange(num_groups, dtype=np.int32).repeat(len(changes))
    return _decision(new_rows=entering, new_blocks=blocks.tobytes(), finished_slots=finished)


def passed(slots: np.ndarray, counts: np.ndarray) -> StepDecision:
    """A pass over so many tokens of the slots."""
    return _decision(slots=slots.astype(np.int32).tobytes(), num_tokens=counts.astype(np.int32).tobytes())


def _decision(
    *,
    slots: bytes = b"",
    num_tokens: bytes = b"",
    new_rows: Sequence[NewRow] = (),
    new_blocks: bytes = b"",
    finished_slots: Sequence[int] = (),
) -> StepDecision:
    return StepDecision(
        step_id=0,
        slots=slots,
        num_tokens=num_tokens,
        new_rows=list(new_rows),
        new_blocks=new_blocks,
        finished_slots=list(finished_slots),
        copies=[],
        zeros=[],
    )
