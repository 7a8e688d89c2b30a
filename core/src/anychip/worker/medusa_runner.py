"""Asks Medusa heads behind the steps that the engine wants drafts for. They read the hidden state of the last token
that a row has, so they keep nothing, and do nothing behind other steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from anychip.models.medusa import MedusaHeads
from anychip.plugin_api import StepInputs
from anychip.step_messages import StepDecision
from anychip.worker.model_runner import RunnerResult

if TYPE_CHECKING:
    from torch import Tensor

_NO_GUESS = -1
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows for which a head is timed."""
_REPEATS = 4


class MedusaRunner:
    def __init__(self, heads: MedusaHeads) -> None:
        self._heads = heads
        self._states: Tensor | None = None

    def read(self, inputs: StepInputs, taps: Sequence[Tensor]) -> None:
        """model_runner.TapReader of the target. The states hold until the next step, and a step that wants drafts is
        answered before it."""
        self._states = taps[0]

    def sampled(self, decision: StepDecision, result: RunnerResult) -> bytes:
        """As DraftRunner.sampled."""
        if not decision.num_proposed:
            return b""
        wanted = np.frombuffer(decision.num_proposed, dtype=np.int32)
        drafts = np.full((len(wanted), max(1, int(wanted.max()))), _NO_GUESS, dtype=np.int32)
        drawn = result.drawn()
        firsts = np.cumsum(drawn.row_ends - drawn.row_starts) - (drawn.row_ends - drawn.row_starts)
        row_of = dict(zip(drawn.row_slots.tolist(), range(len(wanted)), strict=True))
        # Of a row that drew several tokens, the last one counts: it was drawn behind the token before it.
        last = {row_of[slot]: at for slot, at in zip(drawn.slots.tolist(), drawn.positions.tolist(), strict=True)}
        rows = [row for row in last if wanted[row] > 0]
        if rows:
            assert self._states is not None, "every step of a target with heads is tapped"
            tokens = [firsts[row] + last[row] - 1 - drawn.row_starts[row] for row in rows]
            at = torch.from_numpy(np.array(tokens, dtype=np.int64)).to(self._states.device)
            drafts[rows] = self._heads.guesses(self._states[at], drafts.shape[1]).cpu().numpy()
        return drafts[np.arange(drafts.shape[1]) < wanted[:, None]].tobytes()

    def measured(self, like: Tensor, max_rows: int) -> tuple[tuple[int, float], ...]:
        """(rows, seconds) of one head, on hidden states [hidden_size] like this one."""
        found = []
        for rows in (size for size in _SIZES if size <= max_rows):
            states, seconds = like.expand(rows, -1).contiguous(), []
            for _ in range(1 + _REPEATS):
                began = time.perf_counter()
                self._heads.guesses(states, 1).cpu()
                seconds.append(time.perf_counter() - began)
            found.append((rows, min(seconds[1:])))
        return tuple(found)
