"""A step's rows on the host, as the worker's batch works them out of a decision."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from anychip.plugin_api import ADAPTERS, SCORES, EmbeddingRows, EnteringRow, SamplingInputs
from anychip.worker.row_extras import StepExtras


@dataclass(slots=True)
class StepRows:
    """A step's rows on the host, before padding."""

    step_id: int
    slots: np.ndarray  # [num_rows]
    counts: np.ndarray  # [num_rows] tokens computed
    starts: np.ndarray  # [num_rows] position of each row's first token
    sampling: np.ndarray  # indexes of the rows that sample
    sample_rows: np.ndarray  # [num_samples] index of each sample's row
    behind: np.ndarray  # [num_samples] drafted tokens of the row that stand behind the sample's
    drafts: np.ndarray  # ids of the drafted tokens, row after row
    scored: np.ndarray  # [num_rows] tokens of each row that ask for the log-probability of the next prompt token
    entering: list[EnteringRow] = field(default_factory=list)  # new rows with penalties or biases
    embeddings: list[EmbeddingRows] = field(default_factory=list)  # of new rows
    extras: StepExtras | None = None
    adapters: np.ndarray | None = None  # [num_rows] the slot of each row's adapter; None: no row has one
    draws: SamplingInputs | None = None  # staged with the step: what drawing takes where no masks come late

    @property
    def has_drafts(self) -> bool:
        return len(self.drafts) > 0

    @property
    def sample_slots(self) -> np.ndarray:  # [num_samples]
        slots: np.ndarray = self.slots[self.sample_rows]
        return slots

    @property
    def features(self) -> tuple[str, ...]:
        """Of the forward pass, in ShapeKey's order."""
        found: tuple[str, ...] = (SCORES,) if self.scored.any() else ()
        if self.extras is not None:
            found += self.extras.features
        return found if self.adapters is None else (*found, ADAPTERS)
