"""Mixture of experts: routing, dispatch, experts, combine, each overridable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from anychip.errors import Unsupported
from anychip.plugin_api.linear import Packed
from anychip.plugin_api.memory import DeviceMemory
from anychip.plugin_api.quantization import QuantScheme
from anychip.plugin_api.sharding import REPLICATED, Placed
from anychip.types import DType

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.plugin_api.communicator import Communicator


Activation = Literal["silu", "gelu_tanh", "swiglu_clamped"]
"""Of gate, before up multiplies it. swiglu_clamped: (up + 1) * gate * sigmoid(1.702 gate), gate at most and up within 7
of zero (GPT-OSS)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """`intermediate_size` is this rank's share. Experts are gate and up stacked, an activation, then down. `placed`
    says how gate, up and the transpose of down, [num_experts, intermediate_size, hidden_size], lie over the ranks."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: DType
    activation: Activation = "silu"
    bias: bool = False
    """Whether gate, up and down add a bias."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    """Experts are picked within the best `top_groups` of this many groups."""
    top_groups: int = 1
    router_bias: bool = False
    """Whether a correction is added to the scores for picking, not for weighting."""
    router_scale: float = 1.0
    scheme: QuantScheme | None = None
    invariant: bool = False
    placed: Placed = REPLICATED
    num_local_experts: int | None = None
    """Experts that are loaded here, by their place among them; None: all. Routing is over num_experts, and expert_map
    says which those are."""

    @property
    def num_held(self) -> int:
        """Experts whose weights this rank holds."""
        return self.num_experts if self.num_local_experts is None else self.num_local_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParallel:
    """Experts spread over ranks: the communicator that exchanges tokens, and who holds what."""

    communicator: Communicator
    num_local_experts: int


@dataclass(frozen=True, slots=True)
class Routing:
    """weights [num_tokens, top_k] float32 and expert ids [num_tokens, top_k]."""

    weights: Tensor
    expert_ids: Tensor


class FusedMoE:
    """A token's result follows from that token, and is the caller's, as Ops says.

    load is called per expert with parts "gate", "up" and "down", as LinearKernel's is for its parts."""

    name = "unnamed"

    def __init__(self, spec: MoESpec, platform: DeviceMemory) -> None:
        self.spec = spec
        self.platform = platform

    def begin(self) -> Packed:
        raise Unsupported(self.name, ["begin is not implemented"])

    def load(self, packed: Packed, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        """Rows of gate and up [intermediate_size, hidden_size] and of down [hidden_size, intermediate_size], or a
        part's ".bias", ".scale", ".global_scale", ".zero" or ".input_scale"."""
        raise Unsupported(self.name, ["load is not implemented"])

    def finish(self, packed: Packed) -> Packed:
        return packed

    def update(self, packed: Packed, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        self.load(packed, expert, part, tensor, row=row)

    def remap(self, packed: Packed, expert_map: Tensor) -> Packed:
        """Moves experts between ranks; expert_map [num_experts] gives the local index or -1."""
        raise Unsupported(self.name, ["remap is not implemented"])

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        """Picks experts. router_logits [num_tokens, num_experts]. A row's ids are top_k different experts that exist,
        whatever its logits are: NaN and infinities, or minus infinity in all. Its weights may then be anything; other
        rows keep their bits."""
        raise Unsupported(self.name, ["route is not implemented"])

    def experts(self, x: Tensor, routing: Routing, packed: Packed, *, expert_map: Tensor | None = None) -> Tensor:
        """Weighted sum of the picked experts' outputs, [num_tokens, hidden_size]. An id that expert_map turns
        into -1 contributes nothing."""
        raise Unsupported(self.name, ["experts is not implemented"])

    def apply(
        self,
        x: Tensor,  # [num_tokens, hidden_size]
        router_logits: Tensor,  # [num_tokens, num_experts]
        packed: Packed,
        *,
        router_bias: Tensor | None = None,  # [num_experts]
        shared: Tensor | None = None,  # [num_tokens, hidden_size], shared experts' output, added
        ep: ExpertParallel | None = None,
        expert_map: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Default: route, run the experts held here, add the shared ones; with `ep`, every rank runs its own
        experts on all tokens and the partial sums are reduced."""
        routing = self.route(router_logits, router_bias)
        result = self.experts(x, routing, packed, expert_map=expert_map)
        if ep is not None:
            result = ep.communicator.all_reduce(result)
        if shared is not None:
            result = result + shared
        if out is not None:
            out.copy_(result)
            return out
        return result
