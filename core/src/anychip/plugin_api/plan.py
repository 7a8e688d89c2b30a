"""A step as one KV group sees it, what a backend makes of that, and what of it must be renewed at every replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Plan = Any
"""What a backend prepares once a step for one KV group: opaque to core."""


@dataclass(slots=True, kw_only=True)
class BatchView:
    """One step's rows as one KV group sees them. Device tensors, padded to the step's ShapeKey, which may be views (see
    Form in plugin_api/ops.py); the host arrays are unpadded and present as `host_lengths` was declared.

    A row r owns query tokens query_start[r] .. query_start[r + 1]; its keys are the first seq_lens[r] tokens
    of its sequence, the last of them its own. A row may own no token, wherever it stands: nothing is written for it,
    and its length is 0. What is given for a row's tokens, NaN and infinities too, changes no bit of what other rows
    get or keep; a forward's output is the caller's, and stays when the layer is called again.
    """

    query_start: Tensor  # [num_reqs + 1]
    seq_lens: Tensor  # [num_reqs]
    block_table: Tensor  # [num_reqs, num_pages]
    slot_mapping: Tensor  # [num_tokens]; PADDING_SLOT is not written
    positions: Tensor  # [num_tokens]
    num_reqs: int
    num_tokens: int
    max_query_len: int
    block_size: int
    host_query_lens: np.ndarray  # [unpadded rows], always exact
    host_seq_lens: np.ndarray | None  # [unpadded rows]
    host_exact: bool
    host_slot_mapping: np.ndarray | None = None  # [unpadded tokens], where host_lengths is "exact"
    num_accepted: Tensor | None = None  # [num_reqs], drafts accepted by the step before


@dataclass(slots=True)
class Recorder:
    """Collects at capture what must be renewed per replay: a backend registers `renew(plan)`, and
    GraphCapture.run calls it with the replay's plan, before or after the launch as the platform needs."""

    renewals: list[tuple[int, Callable[[Plan], None]]] = field(default_factory=list)
    """(KV group, function of that group's new plan)"""

    def on_replay(self, group: int, renew: Callable[[Plan], None]) -> None:
        self.renewals.append((group, renew))
