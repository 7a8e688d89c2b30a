"""What every step has where a head drafts: taps of all tokens in the target's, a feature for each token in the head's.

A head's features lie in the buffer of embeddings of its own program: there a step reads them by row index, so captured
graphs need nothing new (docs/decisions/0051).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from anychip.plugin_api import EMBEDDINGS, TAPS, ShapeKey, ShapePolicy, StepLimits
from anychip.worker.row_extras import StepExtras
from anychip.worker.step_rows import StepRows

HEAD_FEATURES = (TAPS, EMBEDDINGS)
"""Of all of a head's steps."""


def num_feature_rows(limits: StepLimits, depth: int) -> int:
    """Rows of the features' buffer: those of the steps that may not be followed yet, and one for each guessed token of
    a pass."""
    return (depth + 1) * limits.max_num_tokens + limits.max_num_reqs


def tap_every_token(rows: StepRows) -> None:
    """InputBatch.every_step of the target."""
    extras = StepExtras() if rows.extras is None else rows.extras
    extras.tapped = [np.arange(rows.counts.sum(), dtype=np.int32)]
    rows.extras = extras


class HeadSteps:
    """InputBatch.every_step of a head. Before a pass, `features` are set to the buffer's row of each of its tokens, and
    `draws` to whether each of its rows draws; None: the first row of the buffer, and all do."""

    def __init__(self) -> None:
        self.features: np.ndarray | None = None  # [num_tokens] int32
        self.draws: np.ndarray | None = None  # [num_rows] bool

    def __call__(self, rows: StepRows) -> None:
        num_tokens = int(rows.counts.sum())
        features = np.zeros(num_tokens, dtype=np.int32) if self.features is None else self.features
        last = np.cumsum(rows.counts, dtype=np.int32) - 1
        rows.extras = StepExtras(tapped=[last], embedded=[(0, features)])
        if self.draws is not None:
            kept = self.draws[rows.sample_rows]
            rows.sampling = rows.sampling[self.draws[rows.sampling]]
            rows.sample_rows, rows.behind = rows.sample_rows[kept], rows.behind[kept]


class HeadShapes(ShapePolicy):
    """A device's shapes for steps that all have HEAD_FEATURES: those that it gives to plain steps. Which of them have
    graphs is worked out beside it."""

    def __init__(self, inner: ShapePolicy) -> None:
        self._inner = inner

    def bucket(
        self,
        *,
        num_tokens: int,
        num_reqs: int,
        num_samples: int,
        max_query_len: int,
        num_pages: int,
        features: tuple[str, ...],
    ) -> ShapeKey:
        plain = self._inner.bucket(
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_samples=num_samples,
            max_query_len=max_query_len,
            num_pages=num_pages,
            features=(),
        )
        return replace(plain, features=features)
