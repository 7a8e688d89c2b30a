"""What a step gives: token ids, and what else its features asked for, on the host or on its way there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(slots=True, kw_only=True)
class Scores:
    """Of the step's tokens that had a target, in their order."""

    logprobs: np.ndarray  # [num_scored] of the targets
    top_ids: np.ndarray  # [num_scored, MAX_LOGPROBS]
    top_logprobs: np.ndarray


@dataclass(slots=True, kw_only=True)
class HostOutputs:
    """What a step produced, on the host. Logprobs and scores are present when the features asked for them."""

    token_ids: np.ndarray  # [num_samples]
    kept: np.ndarray | None = None  # [num_samples] bool, as Ops.accept_drafts gives it; None: every sample is
    chosen_logprobs: np.ndarray | None = None  # [num_samples]
    top_ids: np.ndarray | None = None  # [num_samples, MAX_LOGPROBS]
    top_logprobs: np.ndarray | None = None
    scores: Scores | None = None
    pooled: np.ndarray | None = None  # [num_reqs, hidden_size] float32, with the feature POOLED


class StepOutputs(Protocol):
    """A step's results on their way to the host."""

    def fetch(self) -> HostOutputs:
        """Waits for this step, and for no later one. The next step may have been started meanwhile; fetched again, the
        outputs are the same."""
        ...


@dataclass(frozen=True, slots=True)
class ReadyOutputs:
    """StepOutputs that are on the host already."""

    host: HostOutputs

    def fetch(self) -> HostOutputs:
        return self.host
