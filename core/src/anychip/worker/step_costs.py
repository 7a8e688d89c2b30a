"""What steps cost on this device, by their tokens: measured once at the start, for those who choose drafts."""

from __future__ import annotations

import time

import numpy as np

from anychip.messages import LateInputs, NewRow, StepDecision
from anychip.plugin_api import KVPlan, StepLimits
from anychip.types import cdiv
from anychip.worker.model_runner import ModelRunner

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Tokens of the steps that are measured. All ranks measure the same, as they must run the same steps."""

_REPEATS = 4


def measure_steps(
    runner: ModelRunner, limits: StepLimits, kv: KVPlan, num_blocks: int
) -> tuple[tuple[int, float], ...]:
    """(tokens, seconds) of steps whose rows have a token and as many drafts as they may. They draw by chance, which
    takes longer than greedy draws: drafts must pay in either case. Slots and blocks that they use are left as those of
    requests that have ended."""
    width = 1 + limits.max_drafts
    per_row = sum(cdiv(width, size) for size in kv.block_sizes)
    costs = []
    for tokens in _SIZES:
        rows = [width] * (tokens // width) + ([tokens % width] if tokens % width else [])
        fits = tokens <= limits.max_num_tokens and len(rows) <= limits.max_num_reqs
        if not fits or len(rows) * per_row >= num_blocks or width > limits.max_model_len:
            break
        seconds = [_timed(runner, kv, rows) for _ in range(1 + _REPEATS)]
        costs.append((tokens, min(seconds[1:])))  # what disturbs a step makes it longer
    return tuple(costs)


def _timed(runner: ModelRunner, kv: KVPlan, rows: list[int]) -> float:
    """Seconds of a step of new rows, all of whose tokens but the first are drafts."""
    next_block, new = 1, []
    for slot, width in enumerate(rows):
        tables = []
        for size in kv.block_sizes:
            tables.append(list(range(next_block, next_block + cdiv(width, size))))
            next_block += cdiv(width, size)
        new.append(
            NewRow(slot=slot, token_ids=bytes(4), num_prompt=1, num_computed=0, block_ids=tables, temperature=1.0)
        )
    drafts = np.array(rows, dtype=np.int32) - 1
    decision = StepDecision(
        step_id=0,
        slots=np.arange(len(rows), dtype=np.int32).tobytes(),
        num_tokens=np.array(rows, dtype=np.int32).tobytes(),
        new_rows=new,
        new_blocks=b"",
        finished_slots=[],
        copies=[],
        zeros=[],
        num_drafts=drafts.tobytes() if drafts.any() else b"",
        drafts=np.zeros(drafts.sum(), dtype=np.int32).tobytes(),
    )
    began = time.perf_counter()
    runner.launch(decision)
    runner.sample(LateInputs(0, {})).fetch()
    return time.perf_counter() - began
