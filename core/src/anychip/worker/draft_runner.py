"""Runs the draft model behind the target's steps: it catches up with their tokens, then guesses those that follow.

It is a second ModelRunner over the target's blocks (docs/decisions/0042). Its steps are made here: a first pass takes,
row by row, the tokens that the draft model lacks, and each later one a token a row, the one before it drew. Is told of
all of the target's steps in launch order. Decides nothing: the engine says who is drafted for, and how far.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from anychip.plugin_api import StepLimits, StepRules
from anychip.step_messages import LateInputs, NewRow, StepDecision
from anychip.types import cdiv
from anychip.worker.draft_coverage import Coverage
from anychip.worker.draft_decisions import changed, new_blocks, passed
from anychip.worker.model_runner import DrawnIds, ModelRunner, RunnerResult

_NO_GUESS = -1


class DraftRunner:
    """`runner` has the draft model's program, and tables for `num_groups` groups that are all alike: the blocks are
    those of the target's group `group`. Texts beyond `max_positions` tokens are not drafted for. Results of steps that
    are `depth` launches old are there."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        group: int,
        num_groups: int,
        block_size: int,
        num_blocks: int,
        limits: StepLimits,
        rules: StepRules,
        max_drafts: int,
        max_positions: int,
        depth: int,
    ) -> None:
        self.runner = runner
        self._group = group
        self._num_groups = num_groups
        self._limits = limits
        self._rules = rules
        self._max_positions = max_positions
        self._depth = depth
        self._told: deque[tuple[StepDecision, RunnerResult]] = deque()
        self._guesses = np.full((limits.max_slots, max_drafts), _NO_GUESS, dtype=np.int32)
        self.coverage = Coverage(
            max_slots=limits.max_slots,
            num_pages=cdiv(limits.max_model_len, block_size),
            num_blocks=num_blocks,
            block_size=block_size,
        )

    def sampled(self, decision: StepDecision, result: RunnerResult) -> bytes:
        """A step of the target has been sampled. Where its decision asks for drafts, waits for it and returns them, as
        StepResult has them."""
        self._told.append((decision, result))
        if decision.num_proposed:
            while len(self._told) > 1:
                self._follow(*self._told.popleft())
            drawn = self._follow(*self._told.popleft())
            return self._drafts(drawn, np.frombuffer(decision.num_proposed, dtype=np.int32)).tobytes()
        if len(self._told) > self._depth:
            self._follow(*self._told.popleft())
        return b""

    # -- the target's steps -------------------------------------------------------------------------------

    def _follow(self, decision: StepDecision, result: RunnerResult) -> DrawnIds:
        """Takes in what a step changed and drew."""
        changes = new_blocks(decision, self._group)
        coverage, size = self.coverage, self.coverage.block_size
        fresh: list[int] = changes[:, 3].tolist()
        for row in decision.new_rows:
            fresh += row.block_ids[self._group][cdiv(row.num_computed, size) :]
        coverage.blocks_change(decision.copies, fresh)
        entering = [self._enter(row) for row in decision.new_rows]
        if len(changes):
            coverage.take(changes[:, 0], changes[:, 2], changes[:, 3])
        if entering or len(changes) or decision.finished_slots:
            self.runner.batch.apply(changed(entering, changes, decision.finished_slots, num_groups=self._num_groups))
        if decision.copies or decision.zeros:
            self.runner.edit(decision.copies, decision.zeros)
        drawn = result.drawn()
        if len(drawn.ids):
            self.runner.batch.learn(drawn.slots, drawn.positions, drawn.ids)
        return drawn

    def _enter(self, row: NewRow) -> NewRow:
        table = row.block_ids[self._group]
        count = self.coverage.enter(row.slot, table, row.num_computed)
        return NewRow(row.slot, row.token_ids, row.num_prompt, count, [table] * self._num_groups)

    # -- drafts -------------------------------------------------------------------------------------------

    def _drafts(self, drawn: DrawnIds, wanted: np.ndarray) -> np.ndarray:
        """Behind each of a step's rows, so many tokens: [sum of wanted] int32."""
        row_slots = drawn.row_slots
        self._confirm(row_slots)
        known = self.runner.batch.num_known(row_slots)
        lengths = np.where(known + wanted <= self._max_positions, wanted, 0)
        # A prompt that the target has computed in part is caught up with too, so that its end does not wait for it.
        is_prompt = ~np.isin(row_slots, drawn.slots)
        ends = np.where(is_prompt, np.minimum(drawn.row_ends, self._max_positions), 0)
        first = self._first_pass(np.where(lengths > 0, known, ends), row_slots, lengths)
        drafts = np.full((len(row_slots), max(1, int(wanted.max()))), _NO_GUESS, dtype=np.int32)
        if len(first.rows):
            self._run_passes(first, row_slots, known, lengths, drafts)
        asked = np.arange(drafts.shape[1]) < wanted[:, None]
        flat: np.ndarray = drafts[asked]
        return flat

    def _confirm(self, slots: np.ndarray) -> None:
        """Guesses that turned out right are tokens, and their pages are there."""
        coverage, batch = self.coverage, self.runner.batch
        at, known = coverage.computed[slots], batch.num_known(slots)
        ahead = np.minimum(coverage.reached[slots], known) - at
        if not (ahead > 0).any():
            return
        places = np.arange(int(ahead.max()))
        positions = np.minimum(at[:, None] + places, known[:, None] - 1)
        ids = batch.ids_at(slots[:, None], positions)
        is_right = (ids == self._guesses[slots, : len(places)]) & (places < ahead[:, None])
        num_right = np.cumprod(is_right, axis=1).sum(axis=1)
        some = num_right > 0
        coverage.computes(slots[some], (at + num_right)[some])

    def _first_pass(self, ends: np.ndarray, slots: np.ndarray, lengths: np.ndarray) -> FirstPass:
        """Who takes how many of the tokens that the draft model lacks of those before `ends`: first the rows that are
        drafted for and lack least, as far as a step may have tokens. The last row may catch up in part."""
        lacking = ends - self.coverage.computed[slots]
        order = np.lexsort((lacking, lengths == 0))
        order = order[lacking[order] > 0]
        left, multiple = self._limits.max_num_tokens, self._rules.chunk_multiple
        rows, counts = list[int](), list[int]()
        for row in order[: self._limits.max_num_reqs].tolist():
            count = int(lacking[row])
            if count > left or not lengths[row]:  # not the last of its tokens
                count = min(count, left) // multiple * multiple
            if count:
                rows.append(row)
                counts.append(count)
                left -= count
        while rows and self._rules.broken_by(counts):
            rows.pop()
            counts.pop()
        return FirstPass(np.array(rows, dtype=np.int64), np.array(counts, dtype=np.int32))

    def _run_passes(
        self, first: FirstPass, row_slots: np.ndarray, known: np.ndarray, lengths: np.ndarray, drafts: np.ndarray
    ) -> None:
        """Fills `drafts` [num_rows, longest] of the rows that have caught up."""
        coverage, rows = self.coverage, first.rows
        slots = row_slots[rows]
        starts = coverage.computed[slots]
        self.runner.batch.stand_at(slots, starts)
        passes = [(rows[starts + first.counts == known[rows]], self._launch(slots, first.counts))]
        coverage.computes(slots, starts + first.counts)
        drafting = passes[0][0]
        drafting = drafting[lengths[drafting] > 0]
        for place in range(1, int(lengths[drafting].max(initial=1))):
            more = drafting[lengths[drafting] > place]
            passes.append((more, self._launch(row_slots[more], np.ones(len(more), dtype=np.int32))))
        for place, (sampled, result) in enumerate(passes):
            drafts[sampled, place] = np.frombuffer(result.fetch().token_ids, dtype=np.int32)
        drafts[lengths == 0] = _NO_GUESS
        reached = row_slots[drafting]
        coverage.reached[reached] = known[drafting] + lengths[drafting] - 1
        self._guesses[reached, : drafts.shape[1]] = drafts[drafting]

    def _launch(self, slots: np.ndarray, counts: np.ndarray) -> RunnerResult:
        self.runner.launch(passed(slots, counts))
        return self.runner.sample(LateInputs(0, {}))


class FirstPass(NamedTuple):
    rows: np.ndarray  # indexes of the target's step's rows
    counts: np.ndarray  # tokens of each
