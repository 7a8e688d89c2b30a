"""What steps cost on this device, by their tokens: measured once at the start, for those who choose drafts."""

from __future__ import annotations

import time

from anychip.plugin_api import KVPlan, StepLimits
from anychip.step_messages import StepDecision
from anychip.worker.made_up_step import blocks_taken, made_up_step, run_step
from anychip.worker.model_runner import ModelRunner

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Tokens of the steps that are measured. All ranks measure the same, as they must run the same steps."""

_REPEATS = 4


def measure_steps(
    runner: ModelRunner, limits: StepLimits, kv: KVPlan, pool: int, *, temperature: float
) -> tuple[tuple[int, float], ...]:
    """(tokens, seconds) of steps whose rows have a token and as many drafts as they may, on a KV pool of so many
    blocks. Slots and blocks that they use are left as those of requests that have ended."""
    width = 1 + limits.max_drafts
    decisions = {}
    for tokens in _SIZES:
        rows = [width] * (tokens // width) + ([tokens % width] if tokens % width else [])
        fits = tokens <= limits.max_num_tokens and len(rows) <= limits.max_num_reqs and width <= limits.max_model_len
        if not fits or blocks_taken([width] * len(rows), kv.block_sizes) >= pool:
            break
        decisions[tokens] = made_up_step(
            rows, num_drafts=[row - 1 for row in rows], block_sizes=kv.block_sizes, temperature=temperature
        )
    # In turn: what disturbs the machine for a while disturbs one repeat of all sizes, and not all repeats of one.
    rounds = [[_timed(runner, decision) for decision in decisions.values()] for _ in range(1 + _REPEATS)]
    # What disturbs a step makes it longer.
    return tuple(zip(decisions, map(min, zip(*rounds[1:], strict=True)), strict=True))


def _timed(runner: ModelRunner, decision: StepDecision) -> float:
    began = time.perf_counter()
    run_step(runner, decision)
    return time.perf_counter() - began
