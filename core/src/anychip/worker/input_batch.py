"""The worker's memory of its requests, by slot, kept in step with the engine by deltas; builds each step's inputs. How
tokens are drawn is worker/row_sampling.py's, and what only some rows have is worker/row_extras.py's.

Everything is numpy on the host. Ids that only the device knows are left as -1 in the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from anychip.plugin_api import (
    NO_ADAPTER,
    NULL_BLOCK,
    EmbeddingRows,
    EnteringRow,
    SamplingInputs,
    ShapePolicy,
    StepInputs,
    StepLimits,
)
from anychip.plugin_api.step_arrays import Layout
from anychip.plugin_api.step_layout import (
    array_views,
    sampling_layout,
    staged_size,
    step_inputs,
    step_layout,
)
from anychip.step_messages import LateInputs, NewRow, StepDecision
from anychip.worker.row_extras import RowExtras, Views
from anychip.worker.row_sampling import RowSampling, fill
from anychip.worker.staging import StagingRing
from anychip.worker.step_rows import StepRows


class InputBatch:
    def __init__(
        self,
        *,
        limits: StepLimits,
        block_sizes: Sequence[int],
        slot_dtype: str,
        dummy_padding: bool,
        vocab_size: int,
        policy: ShapePolicy,
        ring: StagingRing,
        states: bool = False,
    ) -> None:
        """`block_sizes` are those of the groups of tokens; `states`: behind them is a group of states."""
        slots = limits.max_slots
        self.limits = limits
        self.block_sizes = tuple(block_sizes)
        self.policy = policy
        self.ring = ring
        self._slot_dtype = slot_dtype
        self._dummy_padding = dummy_padding
        self._tokens = np.zeros((slots, limits.max_model_len + 1), dtype=np.int32)
        self._num_host = np.zeros(slots, dtype=np.int32)  # ids that the host has
        self._num_known = np.zeros(slots, dtype=np.int32)  # ids that the host or the device has
        self._num_computed = np.zeros(slots, dtype=np.int32)
        self._token_tables = [np.zeros((slots, pages), dtype=np.int32) for pages in limits.max_pages]
        self._states = np.zeros((slots, 1), dtype=np.int32) if states else None
        self._tables = self._token_tables if self._states is None else [*self._token_tables, self._states]
        self.sampling = RowSampling(slots, vocab_size)
        self._score_from = np.zeros(slots, dtype=np.int32)
        self._score_until = np.zeros(slots, dtype=np.int32)
        self.score_top = np.zeros(slots, dtype=np.int32)
        self._extras = RowExtras(limits)
        self._adapters = np.full(slots, NO_ADAPTER, dtype=np.int32) if limits.max_adapters else None
        self.every_step: Callable[[StepRows], None] | None = None
        """Adds to a step what all steps have, whatever its rows ask for: taps of every token, for one."""

    # -- deltas -------------------------------------------------------------------------------------------

    def apply(self, decision: StepDecision) -> StepRows:
        """Takes in a decision: afterwards every row stands where the step will leave it."""
        self._num_known[decision.finished_slots] = 0
        if self._extras:
            self._extras.leave(decision.finished_slots)
        entering = [edits for row in decision.new_rows if (edits := self._enter(row)) is not None]
        embeddings = self._enter_extras(decision.new_rows) if decision.new_rows else []
        if decision.rewinds:
            rewound = np.frombuffer(decision.rewinds, dtype=np.int32).reshape(-1, 2)
            self._num_computed[rewound[:, 0]] = rewound[:, 1]
            self._num_known[rewound[:, 0]] = rewound[:, 1] + 1
        if decision.new_blocks:
            changes = np.frombuffer(decision.new_blocks, dtype=np.int32).reshape(-1, 4)
            for group, table in enumerate(self._tables):
                mine = changes[changes[:, 1] == group]
                table[mine[:, 0], mine[:, 2]] = mine[:, 3]
        slots = np.frombuffer(decision.slots, dtype=np.int32)
        counts = np.frombuffer(decision.num_tokens, dtype=np.int32)
        starts = self._num_computed[slots]
        ends = starts + counts
        num_drafts = np.frombuffer(decision.num_drafts, dtype=np.int32) if decision.num_drafts else None
        sure, known = ends if num_drafts is None else ends - num_drafts, self._num_known[slots]
        assert (sure <= known).all(), "a decision names a slot that nobody holds, or unknown tokens"
        self._num_computed[slots] = ends
        sampling = np.flatnonzero(sure == known)
        # As if every draft were drawn; where one is not, the slot is rewound before its next step.
        self._num_known[slots[sampling]] = ends[sampling] + 1
        sample_rows, behind = sampling, np.zeros(len(sampling), dtype=np.int32)
        if num_drafts is not None:
            sample_rows, behind = _samples_of(sampling, num_drafts)
        scored = np.minimum(ends, self._score_until[slots]) - np.maximum(starts, self._score_from[slots])
        rows = StepRows(
            step_id=decision.step_id,
            slots=slots,
            counts=counts,
            starts=starts,
            sampling=sampling,
            sample_rows=sample_rows,
            behind=behind,
            drafts=np.frombuffer(decision.drafts, dtype=np.int32),
            scored=np.maximum(scored, 0),
            entering=entering,
            embeddings=embeddings,
            extras=self._extras.step(slots, starts, counts) if self._extras else None,
            adapters=None if self._adapters is None else _any_adapters(self._adapters[slots]),
        )
        if self.every_step is not None:
            self.every_step(rows)
        return rows

    def _enter_extras(self, rows: Sequence[NewRow]) -> list[EmbeddingRows]:
        """What new rows write into the buffer of embeddings."""
        found = []
        for row in rows:
            if row.extras is None and not self._extras:
                continue
            written = self._extras.enter(row)
            if written is not None:
                found.append(written)
            if row.extras is not None and row.extras.pooling is not None:
                self._num_known[row.slot] += 1  # as if one more were known: what is computed never reaches it
        return found

    def _enter(self, row: NewRow) -> EnteringRow | None:
        """What the device must know of a row that has penalties or biases."""
        slot, ids = row.slot, np.frombuffer(row.token_ids, dtype=np.int32)
        self._tokens[slot, : len(ids)] = ids
        self._num_host[slot] = self._num_known[slot] = len(ids)
        self._num_computed[slot] = row.num_computed
        for table, blocks in zip(self._tables, row.block_ids, strict=True):
            table[slot, : len(blocks)] = blocks
            table[slot, len(blocks) :] = NULL_BLOCK
        self._score_from[slot] = row.score_from
        self._score_until[slot] = row.num_prompt - 1  # the last token is followed by no prompt
        self.score_top[slot] = row.score_top
        if self._adapters is not None:
            self._adapters[slot] = row.adapter_slot
        return self.sampling.enter(row, ids)

    def learn(self, slots: np.ndarray, positions: np.ndarray, ids: np.ndarray) -> None:
        """Tokens that another model drew, a slot's in order: they are known from now on, and nothing behind them."""
        self._tokens[slots, positions] = ids
        self._num_host[slots] = self._num_known[slots] = positions + 1

    def stand_at(self, slots: np.ndarray, num_computed: np.ndarray) -> None:
        """The slots' next tokens are those behind so many, whatever was computed before; nothing that was drawn behind
        the known ones counts."""
        self._num_computed[slots] = num_computed
        self._num_known[slots] = self._num_host[slots]

    def num_known(self, slots: np.ndarray) -> np.ndarray:
        """Tokens that the host has. [slots]"""
        known: np.ndarray = self._num_host[slots]
        return known

    def ids_at(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """What the host has there."""
        ids: np.ndarray = self._tokens[slots, positions]
        return ids

    # -- a step's inputs ----------------------------------------------------------------------------------

    def step_inputs(self, rows: StepRows) -> StepInputs:
        """The step, padded to the shape that the device's policy gives it."""
        num_rows, num_tokens = len(rows.slots), int(rows.counts.sum())
        ends = rows.starts + rows.counts
        longest, max_query = int(ends.max()), int(rows.counts.max())
        key = self.policy.bucket(
            num_tokens=num_tokens,
            num_reqs=num_rows,
            num_samples=max(1, len(rows.sample_rows)),  # no array of a sampling is empty
            max_query_len=max_query,
            num_pages=max([-(-longest // size) for size in self.block_sizes], default=1),  # no array is empty
            features=rows.features,
        )
        layout = step_layout(
            key,
            num_groups=len(self._token_tables),
            slot_dtype=self._slot_dtype,
            max_slots=self.limits.max_slots,
            states=self._states is not None,
        )
        draws = sampling_layout(key.num_samples, 0, drafts=rows.has_drafts)
        draws_at, nbytes = staged_size(layout, draws)
        staged = self.ring.take(nbytes)
        views = array_views(staged, layout)
        self._fill_tokens(views, layout, rows, num_tokens)
        starts = np.concatenate(([0], np.cumsum(rows.counts)))
        sampled = (starts[1:] - 1)[rows.sample_rows] - rows.behind
        fill(views, layout, seq_lens=ends, logits_indices=sampled, sample_slots=rows.sample_slots)
        if rows.has_drafts:
            views["input_ids"][sampled[rows.behind > 0] + 1] = rows.drafts
        views["query_start"][: num_rows + 1] = starts
        views["query_start"][num_rows + 1 :] = num_tokens
        if self._states is not None:
            fill(views, layout, state_blocks=self._states[rows.slots, 0])
        for group, table in enumerate(self._token_tables):
            target = views[f"block_table_{group}"]
            pages = min(target.shape[1], table.shape[1])
            target[:num_rows, :pages] = table[rows.slots, :pages]
            target[:num_rows, pages:] = NULL_BLOCK
            target[num_rows:] = NULL_BLOCK
        if "score_targets" in views:
            self._fill_targets(views["score_targets"], rows)
        if rows.extras is not None:
            rows.extras.fill(views, key.num_reqs)
        if rows.adapters is not None:
            fill(views, layout, adapter_slots=np.repeat(rows.adapters, rows.counts))
        if self._dummy_padding and num_rows < key.num_reqs:
            self._dummy_rows(views, num_rows, num_tokens)
        rows.draws = self.sampling.inputs(rows, key, staged[draws_at:], draws, staged_at=draws_at)
        return step_inputs(
            key,
            staged,
            layout,
            views,
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_samples=len(rows.sample_rows),
            max_query_len=max_query,
            has_drafts=rows.has_drafts,
            num_tapped=0 if rows.extras is None else rows.extras.num_tapped,
        )

    def sampling_inputs(self, rows: StepRows, step: StepInputs, late: LateInputs) -> SamplingInputs:
        """What drawing this step's tokens needs, padded to the step's samples: what was staged with the step, or, with
        masks, a buffer of its own."""
        assert rows.draws is not None, "the step's inputs come first"
        return self.sampling.masked(rows, step.key, self.ring, late) if late.masks else rows.draws

    def _fill_tokens(self, views: Views, layout: Layout, rows: StepRows, num_tokens: int) -> None:
        if num_tokens == len(rows.slots):  # one token a row
            token_slots, positions = rows.slots, rows.starts
        else:
            token_slots = np.repeat(rows.slots, rows.counts)
            before = np.repeat(np.cumsum(rows.counts) - rows.counts - rows.starts, rows.counts)
            positions = np.arange(num_tokens, dtype=np.int32) - before
        ids = np.where(positions < self._num_host[token_slots], self._tokens[token_slots, positions], -1)
        fill(views, layout, input_ids=ids, positions=positions, token_slots=token_slots)
        for group, (table, size) in enumerate(zip(self._token_tables, self.block_sizes, strict=True)):
            mapping = table[token_slots, positions // size].astype(self._slot_dtype) * size + positions % size
            fill(views, layout, **{f"slot_mapping_{group}": mapping})

    def _fill_targets(self, targets: np.ndarray, rows: StepRows) -> None:
        targets.fill(-1)
        first_tokens = np.cumsum(rows.counts) - rows.counts
        for row in np.flatnonzero(rows.scored).tolist():
            slot, start = rows.slots[row], int(rows.starts[row])
            first = max(start, int(self._score_from[slot]))
            count, at = int(rows.scored[row]), int(first_tokens[row]) + first - start
            targets[at : at + count] = self._tokens[slot, first + 1 : first + 1 + count]

    @staticmethod
    def _dummy_rows(views: Views, num_rows: int, num_tokens: int) -> None:
        """Gives each padded row one padded token on the null block, as far as there are padded tokens."""
        starts = views["query_start"]
        total = len(views["input_ids"])
        starts[num_rows:] = np.minimum(num_tokens + np.arange(len(starts) - num_rows), total)
        views["seq_lens"][num_rows:] = np.diff(starts[num_rows:])


def _any_adapters(slots: np.ndarray) -> np.ndarray | None:
    """The slots of a step's rows; None where no row has an adapter."""
    return slots if (slots != NO_ADAPTER).any() else None


def _samples_of(sampling: np.ndarray, num_drafts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of each sample, and how many drafted tokens of the row stand behind the sample's."""
    num_samples = num_drafts[sampling] + 1
    ends = np.repeat(np.cumsum(num_samples), num_samples)
    return np.repeat(sampling, num_samples), (ends - 1 - np.arange(len(ends))).astype(np.int32)
