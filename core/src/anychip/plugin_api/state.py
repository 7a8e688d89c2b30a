"""State layers: a recurrence whose past is one fixed block per sequence, and the backend's contract.

A sequence has one state block from its first token to its last, the same in every state layer, out of a pool of its
own. Every token that a step computes advances the states once; no token is computed twice while a sequence runs. Inputs
may be views: see Form in plugin_api/ops.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anychip.errors import Unsupported
from anychip.plugin_api.cache import Cache, CacheBackend, CanonicalArray, plain_bytes
from anychip.plugin_api.plan import Plan, Recorder
from anychip.plugin_api.recurrences import RECURRENCES
from anychip.types import DType

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from anychip.plugin_api.graph import ShapeKey
    from anychip.plugin_api.ops import Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """What state layers of one shape need. Array shapes are those of this rank."""

    recurrence: str
    arrays: tuple[CanonicalArray, ...]
    dtype: DType
    """Of the inputs and the output; an array has its own."""
    invariant: bool = False
    """Asks for kernels whose result for a row does not depend on the rest of the batch."""

    def canonical(self, block_size: int) -> tuple[CanonicalArray, ...]:
        """A sequence's state, however many tokens it has taken in."""
        return self.arrays


def state_spec(recurrence: str, dtype: DType, *, invariant: bool = False, **dims: int) -> StateSpec:
    """The spec of a recurrence whose arrays have dimensions of these sizes, as RECURRENCES names them."""
    known = RECURRENCES[recurrence]
    arrays = tuple(
        CanonicalArray(name, tuple(dims[dim] for dim in shape), dtype if name in known.narrow else "float32")
        for name, shape in known.arrays.items()
    )
    return StateSpec(recurrence=recurrence, arrays=arrays, dtype=dtype, invariant=invariant)


@dataclass(slots=True, kw_only=True)
class StateView:
    """One step's rows as state layers see them. Device tensors, padded to the step's ShapeKey.

    A row r owns tokens query_start[r] .. query_start[r + 1], which come behind the seq_lens[r] minus that many tokens
    that its state has taken in. Tokens from query_start[num_reqs] on are padding and advance nothing; neither does a
    row without a token. What a row takes in, NaN too, changes no bit of another's output or state.
    """

    query_start: Tensor  # [num_reqs + 1]
    seq_lens: Tensor  # [num_reqs]
    state_blocks: Tensor  # [num_reqs]; NULL_BLOCK for a padded row
    num_reqs: int
    num_tokens: int
    max_query_len: int
    host_query_lens: np.ndarray  # [unpadded rows], always exact

    def is_fresh(self) -> Tensor:
        """[num_reqs] bool: rows at their first token. They start from zeros, whatever their block holds: it may be
        another sequence's last state."""
        return self.seq_lens == self.query_start[1:] - self.query_start[:-1]


@dataclass(slots=True, kw_only=True)
class StateLayer:
    """What is fixed for one layer: the recurrence's weights by name, on the device."""

    index: int
    ops: Ops
    weights: Mapping[str, Tensor] = field(default_factory=dict)


class StateBackend(CacheBackend):
    """A subclass writes make_cache and forward, and CacheBackend's methods. `state_bytes` and `plan` suit the plain
    layout and kernels that need nothing but the view."""

    def __init__(self, spec: StateSpec) -> None:
        self.spec = spec

    def state_bytes(self) -> int:
        """Bytes of one sequence's block of one layer."""
        return plain_bytes(self.spec, 1)

    def make_cache(self, raw: Tensor, num_blocks: int) -> Cache:
        """A cache over `raw`, uint8 [num_blocks * state_bytes()], which it must not copy."""
        raise Unsupported(self.name, ["make_cache is not implemented"])

    def plan(
        self,
        view: StateView,
        shape: ShapeKey,
        *,
        group: int,
        into: Plan | None = None,
        recorder: Recorder | None = None,
    ) -> Plan:
        """As AttentionBackend.plan, for the layers of one spec."""
        return view

    def forward(
        self, inputs: Mapping[str, Tensor], cache: Cache, plan: Plan, layer: StateLayer
    ) -> tuple[Tensor, Cache]:
        """The recurrence's output for every token [num_tokens, ...] in the spec's dtype, and the cache with every row's
        state after its last token. `inputs` are those that RECURRENCES names. Padded tokens come back as zeros.

        However a sequence's tokens are spread over steps, states and outputs are the same up to rounding.
        """
        raise Unsupported(self.name, ["forward is not implemented"])
