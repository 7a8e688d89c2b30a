"""How the worker's rows draw their tokens, by slot, and a step's arrays for it. The masks that restrict a draw come
late, and no slot keeps them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from anychip.plugin_api import DRAFTS, EDITS, LOGPROBS, MASKS, EnteringRow, SamplingInputs, ShapeKey
from anychip.plugin_api.step_arrays import Layout
from anychip.plugin_api.step_layout import arena_size, array_views, mask_words, sampling_inputs, sampling_layout
from anychip.step_messages import LateInputs, NewRow
from anychip.worker.row_extras import Views
from anychip.worker.staging import StagingRing
from anychip.worker.step_rows import StepRows
from anychip.worker.token_counter import TokenCounter

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTS = ("top_k", "seed_low", "seed_high", "sample_index", "num_biases")


class RowSampling:
    def __init__(self, slots: int, vocab_size: int) -> None:
        self._mask_words = mask_words(vocab_size)
        self._counter = TokenCounter(vocab_size)
        self._floats = {name: np.zeros(slots, dtype=np.float32) for name in _FLOATS}
        self._ints = {name: np.zeros(slots, dtype=np.int32) for name in _INTS}
        self._edited = np.zeros(slots, dtype=bool)  # whether penalties or biases change the slot's logits
        self.num_logprobs = np.full(slots, -1, dtype=np.int32)

    def enter(self, row: NewRow, ids: np.ndarray) -> EnteringRow | None:
        """What the device must know of a row that has penalties or biases. `ids` are its tokens."""
        slot = row.slot
        for name, floats in self._floats.items():
            floats[slot] = getattr(row, name)
        seed = row.seed & 0xFFFFFFFFFFFFFFFF
        words = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32).view(np.int32)
        self._ints["seed_low"][slot], self._ints["seed_high"][slot] = words
        self._ints["top_k"][slot] = min(row.top_k, 2**31 - 1)
        self._ints["sample_index"][slot] = row.sample_index
        self.num_logprobs[slot] = row.logprobs
        self._ints["num_biases"][slot] = len(row.logit_bias)
        penalized = row.repetition_penalty != 1 or row.presence_penalty != 0 or row.frequency_penalty != 0
        self._edited[slot] = penalized or bool(row.logit_bias)
        if not self._edited[slot]:
            return None
        token_ids, counts = self._counter.count(ids, row.num_prompt)
        return EnteringRow(
            slot=slot,
            token_ids=token_ids,
            counts=counts,
            bias_ids=np.fromiter(row.logit_bias.keys(), dtype=np.int32, count=len(row.logit_bias)),
            biases=np.fromiter(row.logit_bias.values(), dtype=np.float32, count=len(row.logit_bias)),
        )

    def masked(self, rows: StepRows, key: ShapeKey, ring: StagingRing, late: LateInputs) -> SamplingInputs:
        """As `inputs`, with masks, in a buffer of its own."""
        layout = sampling_layout(key.num_samples, self._mask_words, drafts=rows.has_drafts)
        inputs = self.inputs(rows, key, ring.take(arena_size(layout)), layout)
        masks = inputs.masks
        assert masks is not None
        masks.fill(layout["masks"].padding)
        for position, mask in late.masks.items():
            masks[position] = np.frombuffer(mask, dtype=np.int32)
        return inputs

    def inputs(
        self, rows: StepRows, key: ShapeKey, arena: np.ndarray, layout: Layout, *, staged_at: int | None = None
    ) -> SamplingInputs:
        """Writes into an arena what drawing takes of the step's slots. `key` is the step's."""
        slots, views = rows.sample_slots, array_views(arena, layout)
        self._fill(views, layout, rows)
        asked = {
            LOGPROBS: (self.num_logprobs[slots] >= 0).any(),
            MASKS: "masks" in layout,
            EDITS: self._edited[slots].any(),
            DRAFTS: rows.has_drafts,
        }
        features = tuple(name for name, wanted in asked.items() if wanted)
        return sampling_inputs(
            key if features == key.features else replace(key, features=features),
            arena,
            layout,
            views,
            num_samples=len(slots),
            all_greedy=not self._floats["temperature"][slots].any(),
            staged_at=staged_at,
        )

    def _fill(self, views: Views, layout: Layout, rows: StepRows) -> None:
        slots = rows.sample_slots
        by_slot = {name: values[slots] for name, values in {**self._floats, **self._ints}.items()}
        fill(views, layout, position=(rows.starts + rows.counts)[rows.sample_rows] - rows.behind, **by_slot)
        if rows.has_drafts:
            draft_ids = np.full(len(slots), -1, dtype=np.int32)
            draft_ids[rows.behind > 0] = rows.drafts
            first_samples = np.searchsorted(rows.sample_rows, rows.sample_rows)
            fill(views, layout, draft_ids=draft_ids, first_samples=first_samples)


def fill(views: Views, layout: Layout, **values: np.ndarray) -> None:
    """Arrays by name, and their padding behind what is given."""
    for name, given in values.items():
        views[name][: len(given)] = given
        views[name][len(given) :] = layout[name].padding
