"""Runs steps on a StepProgram, whichever seam it comes from: deltas in, tokens out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from anychip.plugin_api import HostOutputs, Scores, StepInputs, StepOutputs, StepProgram
from anychip.step_messages import AdapterSlot, LateInputs, StepDecision, StepResult, TokenLogprobs
from anychip.worker.input_batch import InputBatch
from anychip.worker.step_rows import StepRows
from anychip.worker.vector_head import VectorHead

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.plugin_api import AdapterEntry


TapReader = Callable[[StepInputs, Sequence["Tensor"]], None]
"""Takes a step and, by layer of StepLimits.taps, the hidden states [num_tokens, hidden_size] of its tap_tokens, of
which the first num_tapped count. They are the device's, and hold until the next step."""


class ModelRunner:
    """One step is launched at a time and sampled before the next is launched; results are fetched later."""

    def __init__(self, program: StepProgram, batch: InputBatch, state: object, head: VectorHead | None = None) -> None:
        """`head` makes of pooled vectors what is served, for requests that ask for it."""
        self.passes_on = False
        """Whether another stage has the results: then those of this one are empty."""
        self.await_ids: Callable[[Any, int], None] = lambda state, ids_behind: None
        """Takes in drawn ids before a step, where others draw; StepDecision.ids_behind says which."""
        self.join_others: Callable[[], None] = lambda: None
        """What a step without rows does: other lanes' tokens have experts here."""
        self.program = program
        self.head = head
        self.batch = batch
        self._state = state
        self._launched: tuple[StepRows, StepInputs | None, object] | None = None
        self.read_taps: TapReader = lambda inputs, taps: None
        """Is shown each step's taps: a proposer that reads the model's hidden states, for one."""
        self.adapter_entries: Callable[[Sequence[AdapterSlot]], Sequence[AdapterEntry]] = lambda slots: ()
        """Finds what is to be in slots of adapters."""

    def launch(self, decision: StepDecision) -> None:
        """Applies the deltas and starts the forward pass."""
        assert self._launched is None, "a step was launched and not sampled"
        rows = self.batch.apply(decision)
        if not len(rows.slots):
            self.join_others()
            self._launched = (rows, None, None)
            return
        if decision.copies or decision.zeros:
            self.edit(decision.copies, decision.zeros)
        if decision.state_copies:
            self._state = self.program.copy_states(self._state, decision.state_copies)
        if rows.entering:
            self._state = self.program.enter(self._state, rows.entering)
        if rows.embeddings:
            self._state = self.program.embed(self._state, rows.embeddings)
        if decision.adapters:
            self._state = self.program.adapt(self._state, self.adapter_entries(decision.adapters))
        inputs = self.batch.step_inputs(rows)
        self.await_ids(self._state, decision.ids_behind)
        self._state, hidden = self.program.forward(self._state, inputs)
        if inputs.num_tapped:
            self.read_taps(inputs, self.program.taps(hidden))
        self.batch.ring.used()
        self._launched = (rows, inputs, hidden)

    def edit(self, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> None:
        """StepProgram.edit."""
        self._state = self.program.edit(self._state, copies, zeros)

    def sample(self, late: LateInputs) -> RunnerResult:
        """Starts the sampling of the launched step."""
        assert self._launched is not None, "no step was launched"
        rows, step, hidden = self._launched
        self._launched = None
        if step is None:
            return RunnerResult(rows, NothingDrawn(), self.batch.sampling.num_logprobs[:0], ())
        inputs = self.batch.sampling_inputs(rows, step, late)
        self._state, outputs = self.program.sample(self._state, hidden, inputs)
        self.batch.ring.used()
        if self.passes_on:
            return PassedOn(rows, outputs, self.batch.sampling.num_logprobs[:0], ())
        wanted = self.batch.sampling.num_logprobs[rows.sample_slots]
        scored = [
            (row, int(rows.scored[row]), int(self.batch.score_top[rows.slots[row]])) for row in _rows(rows.scored)
        ]
        return RunnerResult(rows, outputs, wanted, scored, self.head)


class NothingDrawn:
    """plugin_api.StepOutputs of a step without rows."""

    def fetch(self) -> HostOutputs:
        return HostOutputs(token_ids=np.empty(0, dtype=np.int32))


class DrawnIds(NamedTuple):
    """A step's rows, and what counts of what they drew, a row's tokens in order."""

    row_slots: np.ndarray  # [num_rows]
    row_starts: np.ndarray  # [num_rows] tokens that were computed before
    row_ends: np.ndarray  # [num_rows] tokens that are computed, drafts among them
    slots: np.ndarray  # [num_drawn]
    positions: np.ndarray  # [num_drawn]
    ids: np.ndarray  # [num_drawn]


class RunnerResult:
    """executor.PendingResult over a program's outputs. `num_logprobs` [num_samples]: -1 for rows without. `scored`
    has (row, tokens, likeliest to report) of the rows with scored tokens."""

    def __init__(
        self,
        rows: StepRows,
        outputs: StepOutputs,
        num_logprobs: np.ndarray,
        scored: Sequence[tuple[int, int, int]],
        head: VectorHead | None = None,
    ) -> None:
        self._rows = rows
        self._outputs = outputs
        self._num_logprobs = num_logprobs
        self._scored = scored
        self._head = head

    def fetch(self) -> StepResult:
        host = self._outputs.fetch()
        ids = np.ascontiguousarray(host.token_ids, dtype=np.int32)
        if host.kept is None:
            return StepResult(
                self._rows.step_id,
                ids.tobytes(),
                self._logprobs(host, range(len(ids))),
                self._scores(host.scores),
                vectors=self._vectors(host),
            )
        kept = np.flatnonzero(host.kept)
        sampling = self._rows.sampling
        gained = np.searchsorted(sampling, self._rows.sample_rows[kept])  # by kept sample: which sampling row's it is
        num_gained = np.bincount(gained, minlength=len(sampling)).astype(np.int32)
        return StepResult(
            self._rows.step_id,
            ids[kept].tobytes(),
            self._logprobs(host, kept.tolist()),
            self._scores(host.scores),
            num_gained.tobytes(),
            self._vectors(host),
        )

    def drawn(self) -> DrawnIds:
        """Waits for the step, and leaves it to be fetched."""
        host, rows = self._outputs.fetch(), self._rows
        kept = np.arange(len(rows.sample_rows)) if host.kept is None else np.flatnonzero(host.kept)
        of = rows.sample_rows[kept]
        ends = rows.starts + rows.counts
        ids = np.asarray(host.token_ids, dtype=np.int32)[kept]
        return DrawnIds(rows.slots, rows.starts, ends, rows.slots[of], ends[of] - rows.behind[kept], ids)

    def _logprobs(self, host: HostOutputs, kept: Sequence[int]) -> dict[int, TokenLogprobs]:
        """By place among the kept samples."""
        if host.chosen_logprobs is None or host.top_ids is None or host.top_logprobs is None:
            return {}
        wanted = self._num_logprobs
        return {
            place: _entry(host.chosen_logprobs, host.top_ids, host.top_logprobs, sample, int(wanted[sample]))
            for place, sample in enumerate(kept)
            if wanted[sample] >= 0
        }

    def _vectors(self, host: HostOutputs) -> dict[int, bytes]:
        """Of the rows whose prompt this step has finished."""
        extras = self._rows.extras
        if extras is None or not extras.pooled:
            return {}
        for each in extras.pooled:
            if each.counts:
                assert host.pooled is not None, "a step with the feature POOLED gave no sums"
                each.vector.add(host.pooled[each.row])
        ended = [each for each in extras.pooled if each.ends]
        vectors = [each.vector.pooled() for each in ended]
        headed = [at for at, each in enumerate(ended) if each.vector.pooling.head]
        if headed and self._head is not None:
            for at, vector in zip(headed, self._head(np.stack([vectors[at] for at in headed])), strict=True):
                vectors[at] = vector
        return {each.row: each.vector.finished(vector) for each, vector in zip(ended, vectors, strict=True)}

    def _scores(self, scores: Scores | None) -> dict[int, list[TokenLogprobs]]:
        found: dict[int, list[TokenLogprobs]] = {}
        if scores is not None:
            start = 0
            for row, tokens, top in self._scored:
                found[row] = [
                    _entry(scores.logprobs, scores.top_ids, scores.top_logprobs, start + at, top)
                    for at in range(tokens)
                ]
                start += tokens
        return found


class PassedOn(RunnerResult):
    """Of a step that another stage of the pipeline finishes."""

    def fetch(self) -> StepResult:
        self._outputs.fetch()  # raises the device's fault
        return StepResult(self._rows.step_id, b"", {})


def _entry(chosen: np.ndarray, top_ids: np.ndarray, top: np.ndarray, row: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(float(chosen[row]), top_ids[row, :count].tolist(), top[row, :count].tolist())


def _rows(marked: np.ndarray) -> list[int]:
    rows: list[int] = np.flatnonzero(marked).tolist()
    return rows
