"""Encoder attention: all tokens of a sequence see each other within one step, nothing is kept, and the contract of what
computes it.

A row of a step is a whole sequence: core never cuts one. Rows stand one behind the other without padding between them.
Queries, keys and values may be views: see Form in plugin_api/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anychip.errors import Unsupported
from anychip.plugin_api.cache import CacheBackend, CanonicalArray
from anychip.plugin_api.plan import Plan, Recorder
from anychip.types import DType

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from anychip.plugin_api.graph import ShapeKey
    from anychip.plugin_api.ops import Ops, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """What encoder layers of one kind need. Head counts are those of this rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: DType
    window: int | None = None
    """Tokens that a token sees to each side of itself; None: all of its sequence."""
    bias: bool = False
    """Whether scores have a bias by head and distance: EncoderLayer.bias."""
    invariant: bool = False
    """Asks for kernels whose result for a row does not depend on the rest of the batch."""

    def canonical(self, block_size: int) -> tuple[CanonicalArray, ...]:
        """Nothing is kept."""
        return ()


@dataclass(slots=True, kw_only=True)
class EncoderView:
    """One step's rows as encoder layers see them. Device tensors, padded to the step's ShapeKey.

    Row r owns tokens query_start[r] .. query_start[r + 1]. Tokens from query_start[num_reqs] on are padding: what comes
    out for them is nobody's, and finite where the rows are. What a row holds changes no bit of another's output.
    """

    query_start: Tensor  # [num_reqs + 1]
    positions: Tensor  # [num_tokens]
    num_reqs: int
    num_tokens: int
    max_query_len: int
    host_query_lens: np.ndarray  # [unpadded rows], always exact


@dataclass(slots=True, kw_only=True)
class EncoderLayer:
    """What is fixed for one layer: `scale` multiplies q.k."""

    index: int
    scale: float
    ops: Ops
    bias: Tensor | None = None
    """[num_heads, 2 * reach + 1] float32: what is added to a scaled score, by the key's place minus the query's plus
    `reach`. Distances beyond `reach` have its ends' values."""

    @property
    def reach(self) -> int:
        return 0 if self.bias is None else self.bias.shape[1] // 2


class EncoderBackend(CacheBackend):
    """A subclass writes attend, or overrides forward whole."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec

    def plan(
        self,
        view: EncoderView,
        shape: ShapeKey,
        *,
        group: int,
        into: Plan | None = None,
        recorder: Recorder | None = None,
    ) -> Plan:
        """As AttentionBackend.plan, for the layers of one spec."""
        return view

    def forward(
        self,
        q: Tensor,  # [num_tokens, num_heads, head_dim]
        k: Tensor,  # [num_tokens, num_kv_heads, head_dim]
        v: Tensor,
        plan: Plan,
        layer: EncoderLayer,
        *,
        rope: Rope | None = None,
    ) -> Tensor:
        """Attention output [num_tokens, num_heads, head_dim]. The default rotates, then attends; its plan is an
        EncoderView."""
        if rope is not None:
            q, rotated = layer.ops.qkv_norm_rope(q=q, k=k, positions=plan.positions, rope=rope, qk_norm=None)
            k = k if rotated is None else rotated
        return self.attend(q, k, v, plan, layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, layer: EncoderLayer) -> Tensor:
        """The same of queries and keys that are rotated already."""
        raise Unsupported(self.name, ["attend is not implemented"])
