"""Mixture of experts: routing, dispatch, experts, combine, each overridable. Activations and router logits may be
views: see Form in plugin_api/ops.py."""

from __future__ import annotations

from collections.abc import Sequence
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

Ungated = Literal["relu2"]
"""Of up, where experts have no gate. relu2: the square of what is above zero (Nemotron-H)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """`intermediate_size` is this rank's share. Experts are gate and up stacked, an activation, then down. `placed`
    says how gate, up and the transpose of down, [num_experts, intermediate_size, hidden_size], lie over the ranks."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: DType
    activation: Activation | Ungated = "silu"
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
    def gated(self) -> bool:
        """Whether experts have gate and up stacked; else the first matrix is up alone."""
        return self.activation != "relu2"

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
    """weights [num_tokens, top_k] float32 and expert ids [num_tokens, top_k]. Rows that were dispatched have one choice
    each, whatever the spec's top_k is."""

    weights: Tensor
    expert_ids: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """The rows that came to this rank, one for each choice of an expert that lies here, and how they go back."""

    x: Tensor  # [num_rows, hidden_size]
    routing: Routing
    """[num_rows, 1]: places among the experts held here, and weights of one: `combine` weighs."""
    choices: Tensor
    """[num_sent] token * top_k + choice of what this rank sent, in the order in which it was sent."""
    sent: Sequence[int]
    """Rows by the rank that they went to."""
    received: Sequence[int]
    """Rows by the rank that they came from."""


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

    @property
    def has_products(self) -> bool:
        """Whether `product` is there, so that experts may have adapters."""
        return False

    def product(self, x: Tensor, expert_ids: Tensor, packed: Packed, part: Literal["gate_up", "down"]) -> Tensor:
        """Each row of x [num_rows, in_features] times its own expert's gate and up, or down, with the bias:
        [num_rows, out_features], gate's columns first. expert_ids [num_rows] are places among the experts held here;
        a row of -1 may be anything finite. Optional: what stands between the two products is the caller's then."""
        raise Unsupported(self.name, ["adapters of experts: product is not implemented"])

    def expert_tensors(self, packed: Packed, expert: int) -> Sequence[Tensor]:
        """All that is kept of one expert, by its place among those held here: views that a copy into them changes, of
        the same shapes and dtypes for every expert. Optional: without it, experts stay where they are loaded."""
        raise Unsupported(self.name, ["experts that move between ranks: expert_tensors is not implemented"])

    def dispatch(self, x: Tensor, routing: Routing, ep: ExpertParallel) -> Dispatched:
        """Sends tokens to the ranks that hold their experts. x [num_tokens, hidden_size] are this rank's own tokens, of
        which there may be none: the others need it all the same.
        routing.expert_ids are slots: num_local_experts of them lie on each rank, in the order of ranks. A slot of -1
        is sent to nobody. Rows arrive in the order of ranks, and of choices within a rank."""
        slots = routing.expert_ids.flatten().long()
        ranks = slots.div(ep.num_local_experts, rounding_mode="floor")
        counts = (ranks + 1).bincount(minlength=ep.communicator.size + 1)  # the first are nobody's
        arriving = ep.communicator.all_to_all(counts[1:].contiguous())
        nobodys, *sent = counts.tolist()
        received = arriving.tolist()
        choices = ranks.argsort(stable=True)[nobodys:]
        rows = ep.communicator.all_to_all_v(x[choices // routing.expert_ids.shape[1]], sent, received)
        places = ep.communicator.all_to_all_v((slots % ep.num_local_experts)[choices], sent, received)
        ones = routing.weights.new_ones(len(rows), 1)
        return Dispatched(
            x=rows, routing=Routing(ones, places.unsqueeze(1)), choices=choices, sent=sent, received=received
        )

    def combine(self, outputs: Tensor, dispatched: Dispatched, routing: Routing, ep: ExpertParallel) -> Tensor:
        """Brings outputs [num_rows, hidden_size] of dispatched rows back to their tokens: the weighted sums
        [num_tokens, hidden_size]. They are added in the order of a token's choices, so where an expert lies does not
        show in the sum."""
        back = ep.communicator.all_to_all_v(outputs, dispatched.received, dispatched.sent)
        weights = routing.weights.float()
        picked = weights.new_zeros(weights.numel(), outputs.shape[1])
        picked[dispatched.choices] = back.float()
        picked = picked.view(*weights.shape, outputs.shape[1])
        return (picked * weights.unsqueeze(-1)).sum(dim=1).to(outputs.dtype)

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
