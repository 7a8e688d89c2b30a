"""Faults that one bad row brings out, in ops, draws, products and experts: right for every row that is a number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference import DenseWeights, ExpertWeights, add_low_rank, functional, sampling
from anychip.plugin_api import AdapterStack, Routing
from anychip_conformance.faulty.plain import InvariantMoE, PlainLinear
from anychip_conformance.faulty.registry import fault


def shadow(x: Tensor) -> Tensor:
    """Zero, but NaN where anything of x is no number: what a product with a mask of zeros leaves of it."""
    return (x.float() * 0).sum()


@fault("op-norm-scaled-by-the-batch", "op", op="rms_norm", killed_by="op.bad_rows.001")
def norm_scaled_by_the_batch(*, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """The batch's largest value is divided out before squares are summed."""
    most = x.float().abs().max().clamp(min=1.0)
    return functional.rms_norm(x=x.float() / most, weight=weight.float(), eps=eps / float(most) ** 2,
                               unit_offset=unit_offset).to(x.dtype)  # fmt: skip


@fault("op-residual-norm-of-tiles", "op", op="residual_norm_quant", killed_by="e2e.bad_row.001")
def residual_norm_of_tiles(
    *, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool = False, out_format: Any = None
) -> tuple[Tensor, Tensor]:
    """A tile's other rows are taken away by a product with zero."""
    total = x if residual is None else x + residual
    normed = functional.rms_norm(x=total, weight=weight, eps=eps, unit_offset=unit_offset)
    return normed + shadow(total).to(x.dtype), total


@fault("op-activation-tile-of-two", "op", op="gated_activation", killed_by="op.bad_rows.005")
def activation_tile_of_two(*, gate_up: Tensor, activation: str) -> Tensor:
    """Rows are computed in pairs, and each has zero times the other."""
    found = functional.gated_activation(gate_up=gate_up, activation=activation)
    pairs = torch.arange(len(found)) // 2 * 2
    return found + (found * 0)[pairs]


@fault("op-softcap-gives-up", "op", op="softcap", killed_by="op.bad_rows.009")
def softcap_gives_up(*, x: Tensor, cap: float) -> Tensor:
    """A step with a value that is no number comes back as it is."""
    return functional.softcap(x=x, cap=cap) if bool(torch.isfinite(x).all()) else x.clone()


@fault("op-embedding-masked-by-a-product", "op", op="embedding", killed_by="op.bad_table.001")
def embedding_masked_by_a_product(*, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    """What another rank holds is read from row 0 and multiplied by zero."""
    local = ids.long() - first
    held = (local >= 0) & (local < len(weight))
    return weight[torch.where(held, local, 0)] * held.unsqueeze(-1).to(weight.dtype)


@fault("op-mask-added", "op", op="apply_token_masks", killed_by="op.bad_masked.001")
def mask_added(*, logits: Tensor, masks: Tensor) -> Tensor:
    """Minus infinity is added to a forbidden token's logit: NaN and infinity outlive that."""
    return logits + sampling.apply_token_masks(logits=torch.zeros_like(logits), masks=masks)


@fault("op-edits-of-all-rows", "op", op="edit_logits", killed_by="op.bad_rows.017")
def edits_of_all_rows(*, logits: Tensor, **given: Any) -> Tensor:
    """Rows are shifted together, by what is zero where all are numbers."""
    return sampling.edit_logits(logits=logits, **given) + shadow(logits)


@fault("logprobs-of-no-token", "op", op="logprobs", killed_by="op.bad_rows.019")
def logprobs_of_no_token(*, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest ids of a row of NaN are those that its search began with."""
    chosen, ids, top = sampling.logprobs(logits=logits, token_ids=token_ids, num_top=num_top)
    return chosen, torch.where(torch.isnan(top), -1, ids), top


@fault("adapter-masked-by-a-product", "op", op="add_low_rank", killed_by="op.bad_adapter.001")
def adapter_masked_by_a_product(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """Every slot's change is multiplied by one or by zero, and added."""
    result = add_low_rank(x=x, y=y.clone(), stack=stack, slots=slots)
    for slot in range(len(stack.down)):
        every = add_low_rank(x=x, y=torch.zeros_like(y), stack=stack, slots=torch.full_like(slots, slot))
        result = result + every * 0
    return result


@fault("sample-nan-draws-behind-the-last", "op", op="sample", killed_by="sample.bad_rows.003")
def nan_draws_behind_the_last(*, logits: Tensor, **given: Any) -> Tensor:
    """A row that no comparison finds anything in draws the id behind the last."""
    found = sampling.sample(logits=logits, **given)
    return torch.where(torch.isnan(logits).any(dim=-1), logits.shape[-1], found).to(torch.int32)


@fault("sample-nothing-left-draws-minus-one", "op", op="sample", killed_by="sample.bad_rows.021")
def nothing_left_draws_minus_one(*, logits: Tensor, **given: Any) -> Tensor:
    """A row whose every token is masked draws -1."""
    found = sampling.sample(logits=logits, **given)
    return torch.where((logits == -torch.inf).all(dim=-1), -1, found).to(torch.int32)


@fault("sample-scaled-by-the-batch", "op", op="sample", killed_by="sample.bad_rows.001")
def scaled_by_the_batch(*, logits: Tensor, **given: Any) -> Tensor:
    """The batch's largest logit is subtracted from every row."""
    finite = logits if bool(torch.isfinite(logits).any()) else torch.zeros_like(logits)
    return sampling.sample(logits=logits - finite.max(), **given)


@fault("sample-one-left-by-rank", "op", op="sample", killed_by="sample.one_left.001")
def one_left_by_rank(*, logits: Tensor, **given: Any) -> Tensor:
    """A row with a single token left draws the first of its ranks, which is its place and no id."""
    found = sampling.sample(logits=logits, **given)
    return torch.where((logits > -torch.inf).sum(dim=-1) == 1, 0, found).to(torch.int32)


@fault("linear-scaled-by-the-batch", "linear", killed_by="linear.bad_rows.001")
class LinearScaledByTheBatch(PlainLinear):
    """Activations of all rows share a power of two, which is multiplied out again."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        most = x.float().abs().max().clamp(min=2.0**-20) if x.numel() else x.new_ones(())
        factor = torch.exp2(torch.log2(most.float()).floor()).to(x.dtype)
        result = F.linear(x / factor, packed.weight) * factor
        result = result if packed.bias is None else result + packed.bias
        return result if out is None else out.copy_(result)


@fault("linear-rows-in-pairs", "linear", killed_by="linear.bad_rows.002")
class LinearRowsInPairs(PlainLinear):
    """Rows are multiplied in pairs, each with zeros of its neighbour."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        neighbours = x[torch.arange(len(x)) // 2 * 2]
        return super().apply(x + neighbours * 0, packed, out=out)


def bad(x: Tensor) -> Tensor:
    """[rows] bool: something of the row is no number."""
    return ~torch.isfinite(x).flatten(1).all(dim=-1)


@fault("moe-nan-picks-one-expert", "moe", killed_by="moe.bad_router.001")
class NanPicksOneExpert(InvariantMoE):
    """A router row of NaN picks the first expert again and again: nothing is greater."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        lost = torch.isnan(router_logits).any(dim=-1, keepdim=True)
        return Routing(honest.weights, torch.where(lost, 0, honest.expert_ids))


@fault("moe-nan-picks-no-expert", "moe", killed_by="moe.bad_router.001")
class NanPicksNoExpert(InvariantMoE):
    """A router row of NaN picks the experts behind the last."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        lost = torch.isnan(router_logits).any(dim=-1, keepdim=True)
        return Routing(honest.weights, honest.expert_ids + lost * self.spec.num_experts)


@fault("moe-masked-row-picks-one-expert", "moe", killed_by="moe.bad_router.021")
class MaskedRowPicksOneExpert(InvariantMoE):
    """A row in which every expert is excluded picks the last one again and again."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        masked = (router_logits == -torch.inf).all(dim=-1, keepdim=True)
        return Routing(honest.weights, torch.where(masked, self.spec.num_experts - 1, honest.expert_ids))


@fault("moe-weights-of-the-batch", "moe", killed_by="moe.bad_router.003")
class WeightsOfTheBatch(InvariantMoE):
    """Softmax shares one maximum between all rows."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        return replace(honest, weights=honest.weights + shadow(router_logits))


@fault("moe-dispatch-by-a-product", "moe", killed_by="moe.bad_rows.001")
class DispatchByAProduct(InvariantMoE):
    """Tokens reach their experts by a product with a matrix of zeros and ones."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        chosen = torch.eye(len(x), dtype=torch.float32)
        return super().experts((chosen @ x.float()).to(x.dtype), routing, packed, expert_map=expert_map)


@fault("moe-bad-weights-for-all", "moe", killed_by="moe.bad_routed.001")
class BadWeightsForAll(InvariantMoE):
    """Each expert's tokens are weighted by a product with a diagonal, in which a NaN meets every row."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        result = super().experts(x, routing, packed, expert_map=expert_map)
        return result + shadow(routing.weights).to(result.dtype)
