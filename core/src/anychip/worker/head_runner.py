"""Runs a head behind the target's steps, over all of their tokens, then guesses as far as it is asked to.

At position i a head takes the id of token i + 1 and the feature of token i, so its texts are the target's without their
first token. Features exist while the target's step runs: `read` keeps them until the step is followed. Where a step's
rows stand is known then, and the head computes the positions whose next token is known, which rejected drafts are not.
So it never lacks what the target has. Is told of all of the target's steps in launch order. Decides nothing: the engine
says who is drafted for, and how far (docs/decisions/0051).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from anychip.plugin_api import StepInputs, StepLimits
from anychip.step_messages import LateInputs, NewRow, StepDecision
from anychip.worker.draft_decisions import changed, new_blocks, passed
from anychip.worker.head_steps import HeadSteps
from anychip.worker.model_runner import DrawnIds, ModelRunner, RunnerResult

if TYPE_CHECKING:
    from torch import Tensor

_NO_GUESS = -1
_ID_BYTES = 4


class Followed(NamedTuple):
    """A step of the target that is sampled: its features lie in the buffer from row `first` on."""

    decision: StepDecision
    result: RunnerResult
    first: int


class HeadRunner:
    """`runner` has the head's program, whose steps read `features` [num_feature_rows, hidden_size]; its tables have
    `num_groups` groups that are all alike: the blocks are those of the target's group `group`. `join` makes features
    of the target's taps. Results of steps that are `depth` launches old are there."""

    def __init__(
        self,
        runner: ModelRunner,
        join: Callable[[Sequence[Tensor]], Tensor],
        features: Tensor,
        *,
        group: int,
        num_groups: int,
        limits: StepLimits,
        depth: int,
    ) -> None:
        self.runner = runner
        self._join = join
        self._features = features
        self._group = group
        self._num_groups = num_groups
        self._limits = limits
        self._depth = depth
        self._launches = 0
        self._guessed = (depth + 1) * limits.max_num_tokens  # the buffer's first row for guessed tokens
        self._told: deque[Followed] = deque()
        self._steps = HeadSteps()
        runner.batch.every_step = self._steps
        runner.read_taps = self._keep

    @torch.inference_mode()
    def read(self, inputs: StepInputs, taps: Sequence[Tensor]) -> None:
        """model_runner.TapReader of the target: keeps the features of the step that is launched."""
        first = self._first_of(self._launches)
        self._launches += 1
        self._features[first : first + inputs.num_tokens].copy_(self._join(taps)[: inputs.num_tokens])

    def sampled(self, decision: StepDecision, result: RunnerResult) -> bytes:
        """As DraftRunner.sampled."""
        self._told.append(Followed(decision, result, self._first_of(self._launches - 1)))
        if decision.num_proposed:
            while len(self._told) > 1:
                self._follow(self._told.popleft())
            wanted = np.frombuffer(decision.num_proposed, dtype=np.int32)
            drafts = self._follow(self._told.popleft(), wanted)
            return drafts[np.arange(drafts.shape[1]) < wanted[:, None]].tobytes()
        if len(self._told) > self._depth:
            self._follow(self._told.popleft())
        return b""

    def _first_of(self, launch: int) -> int:
        return launch % (self._depth + 1) * self._limits.max_num_tokens

    @torch.inference_mode()
    def _keep(self, inputs: StepInputs, taps: Sequence[Tensor]) -> None:
        """What the head made of the rows' last tokens: the features of the tokens that it guesses, row by row."""
        count = inputs.num_tapped
        self._features[self._guessed : self._guessed + count].copy_(taps[0][:count])

    # -- the target's steps -------------------------------------------------------------------------------

    def _follow(self, step: Followed, wanted: np.ndarray | None = None) -> np.ndarray:
        """Computes a step's tokens, and guesses what follows each row: [num_rows, longest of `wanted`] int32."""
        batch, drawn = self.runner.batch, self._take_in(step)
        slots, starts = drawn.row_slots, drawn.row_starts
        rows = np.arange(len(slots))
        draws = np.isin(slots, drawn.slots)
        # The last token that a row drew has no feature yet; the head knows it as the one before it.
        ends = np.where(draws, batch.num_known(slots), drawn.row_ends)
        if wanted is None:
            wanted = np.zeros(len(slots), dtype=np.int32)
        lengths = np.where(draws, wanted, 0)
        drafts = np.full((len(slots), max(1, int(wanted.max(initial=0)))), _NO_GUESS, dtype=np.int32)
        counts, before = ends - starts, np.cumsum(drawn.row_ends - starts) - (drawn.row_ends - starts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        features = step.first + np.repeat(before, counts) + within
        batch.stand_at(slots, starts)
        passes = [(rows[lengths > 0], self._launch(slots, counts, features, lengths > 0))]
        place_of = rows  # by row of the step: its place in the pass before
        for place in range(1, drafts.shape[1]):
            more = rows[lengths > place]
            if not len(more):
                break
            features, ones = self._guessed + place_of[more], np.ones(len(more), dtype=np.int32)
            passes.append((more, self._launch(slots[more], ones, features, ones > 0)))
            place_of = np.empty_like(rows)
            place_of[more] = np.arange(len(more))
        for place, (guessing, result) in enumerate(passes):
            if len(guessing):
                drafts[guessing, place] = np.frombuffer(result.fetch().token_ids, dtype=np.int32)
        return drafts

    def _take_in(self, step: Followed) -> DrawnIds:
        """What a step changed and drew."""
        decision, batch = step.decision, self.runner.batch
        changes = new_blocks(decision, self._group)
        entering = [self._entering(row) for row in decision.new_rows]
        if entering or len(changes) or decision.finished_slots:
            batch.apply(changed(entering, changes, decision.finished_slots, num_groups=self._num_groups))
        if decision.copies or decision.zeros:
            self.runner.edit(decision.copies, decision.zeros)
        drawn = step.result.drawn()
        if len(drawn.ids):
            batch.learn(drawn.slots, drawn.positions - 1, drawn.ids)
        return drawn

    def _entering(self, row: NewRow) -> NewRow:
        """A row without its first token."""
        tables = [row.block_ids[self._group]] * self._num_groups
        return NewRow(row.slot, row.token_ids[_ID_BYTES:], max(0, row.num_prompt - 1), row.num_computed, tables)

    def _launch(self, slots: np.ndarray, counts: np.ndarray, features: np.ndarray, draws: np.ndarray) -> RunnerResult:
        self._steps.features, self._steps.draws = features.astype(np.int32), draws
        self.runner.launch(passed(slots, counts))
        return self.runner.sample(LateInputs(0, {}))
