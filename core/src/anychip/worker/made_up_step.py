"""A step of made-up requests: what a device is measured with before there are real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from anychip.step_messages import LateInputs, NewRow, StepDecision
from anychip.types import cdiv
from anychip.worker.model_runner import ModelRunner


def blocks_taken(widths: Sequence[int], block_sizes: Sequence[int]) -> int:
    """Blocks that rows of so many tokens take, over all KV groups."""
    return sum(cdiv(width, size) for width in widths for size in block_sizes)


def made_up_step(
    widths: Sequence[int],
    *,
    num_drafts: Sequence[int],
    block_sizes: Sequence[int],
    states: bool = False,
    **sampling: Any,
) -> StepDecision:
    """A row enters each slot from the first on, with so many tokens, of which the last `num_drafts` are drafted; the
    others are its prompt. Blocks are handed out from 1 on, and where the model has `states` one block of each row's.
    `sampling` are fields of NewRow, the same for all."""
    next_block, rows = 1, []
    for slot, (width, drafts) in enumerate(zip(widths, num_drafts, strict=True)):
        tables = []
        for size in block_sizes:
            tables.append(list(range(next_block, next_block + cdiv(width, size))))
            next_block += cdiv(width, size)
        if states:
            tables.append([slot + 1])
        known = width - drafts
        rows.append(NewRow(slot, bytes(4 * known), num_prompt=known, num_computed=0, block_ids=tables, **sampling))
    return StepDecision(
        step_id=0,
        slots=np.arange(len(rows), dtype=np.int32).tobytes(),
        num_tokens=np.array(widths, dtype=np.int32).tobytes(),
        new_rows=rows,
        new_blocks=b"",
        finished_slots=[],
        copies=[],
        zeros=[],
        num_drafts=np.array(num_drafts, dtype=np.int32).tobytes() if any(num_drafts) else b"",
        drafts=bytes(4 * sum(num_drafts)),
    )


def run_step(runner: ModelRunner, decision: StepDecision) -> None:
    """Until its result is there."""
    runner.launch(decision)
    runner.sample(LateInputs(decision.step_id, {})).fetch()
