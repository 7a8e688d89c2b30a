"""State layers without a look at the host: all rows of a step at once, and a new cache.

Each recurrence is an affine map of the state for each token, and maps compose: a scan composes those of 2, 4, 8 tokens
and so on. At a row's first token the map forgets what stands before it in the step, and the row's own state is let in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.ops.reference import RULES, last_copies
from anychip.ops.reference.delta_rules import DeltaRule
from anychip.plugin_api import RECURRENCES, Recorder, ShapeKey, StateBackend, StateLayer, StateView
from anychip.plugin_api.plan import Plan


@dataclass(frozen=True, slots=True)
class FunctionalStatePlan:
    row: Tensor  # [num_tokens] of each token
    place: Tensor  # [num_tokens] in its row
    valid: Tensor  # [num_tokens] bool: no padding
    fresh: Tensor  # [num_reqs] bool: rows at their first token
    blocks: Tensor  # [num_reqs]
    last: Tensor  # [num_reqs] the row's last token
    count: Tensor  # [num_reqs] the row's tokens


def functional_state_plan(starts: Tensor, lengths: Tensor, blocks: Tensor, num_tokens: int) -> FunctionalStatePlan:
    """starts [num_reqs + 1], lengths [num_reqs], blocks [num_reqs]."""
    tokens, counts = torch.arange(num_tokens, device=starts.device), (starts[1:] - starts[:-1]).long()
    row = torch.searchsorted(starts[1:].contiguous(), tokens.int(), right=True).clamp(max=len(lengths) - 1)
    return FunctionalStatePlan(
        row=row,
        place=tokens - starts[row],
        valid=tokens < starts[-1],
        fresh=lengths == counts,
        blocks=blocks.long(),
        last=(starts[1:].long() - 1).clamp(min=0),
        count=counts,
    )


class FunctionalStates(StateBackend):
    """Any recurrence. The cache is the state's one array, [num_blocks, *shape]."""

    name = "functional"

    def make_cache(self, raw: Tensor, num_blocks: int) -> Tensor:
        (array,) = self.spec.arrays
        return raw.view(getattr(torch, array.dtype)).view(num_blocks, *array.shape)

    def plan(
        self,
        view: StateView,
        shape: ShapeKey,
        *,
        group: int,
        into: Plan | None = None,
        recorder: Recorder | None = None,
    ) -> FunctionalStatePlan:
        return functional_state_plan(view.query_start, view.seq_lens, view.state_blocks, view.num_tokens)

    def forward(
        self, inputs: Mapping[str, Tensor], cache: Tensor, plan: FunctionalStatePlan, layer: StateLayer
    ) -> tuple[Tensor, Tensor]:
        name, held = self.spec.recurrence, cache[plan.blocks]  # [num_reqs, *shape]
        wide = {key: given.float() for key, given in inputs.items()}
        weights = {key: weight.float() for key, weight in layer.weights.items()}
        first = torch.where(_as(plan.fresh, held), 0.0, held.float())
        if name == "causal_conv":
            found, last = _convolved(wide["x"], first, plan, weights)
        else:
            found, states = _SCANS[name](wide, first, plan, weights)
            last = states[plan.last]
        after = torch.where(_as(plan.count > 0, held), last.to(held.dtype), held)
        like = inputs[RECURRENCES[name].like]
        result = torch.where(_as(plan.valid, found), found, 0.0).to(like.dtype)
        return result, cache.index_copy(0, plan.blocks, after)

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        sources, destinations = last_copies(src, dst)
        return cache.index_copy(0, torch.tensor(destinations, dtype=torch.int64), cache[sources])

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return cache.index_fill(0, torch.tensor(list(ids), dtype=torch.int64), 0.0)

    def export_arrays(self, cache: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
        return {self.spec.arrays[0].name: cache[list(ids)]}

    def import_arrays(self, cache: Tensor, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> Tensor:
        return cache.index_copy(0, torch.tensor(list(ids), dtype=torch.int64), arrays[self.spec.arrays[0].name])


Given = Mapping[str, Tensor]
Scan = Callable[[Given, Tensor, FunctionalStatePlan, Given], tuple[Tensor, Tensor]]
"""(inputs, states before each row, plan, weights) to outputs [num_tokens, ...] and states [num_tokens, ...]."""


def _scan(
    added: Tensor, kept: Tensor, first: Tensor, plan: FunctionalStatePlan, apply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The states after each token, of maps `apply(kept, state) + added`. A row's maps are composed with its own alone:
    what stands before them may be no number, which a product with zero would not take away."""
    begun = plan.place == 0  # the maps composed so far reach back to their row's first token
    added = torch.where(_as(begun, added), added + apply(kept, first[plan.row]), added)
    reach = 1
    while reach < len(added):
        earlier, passed = torch.roll(added, reach, 0), torch.roll(kept, reach, 0)
        added = torch.where(_as(begun, added), added, added + apply(kept, earlier))
        kept = torch.where(_as(begun, kept), kept, apply(kept, passed))
        begun = begun | torch.roll(begun, reach, 0) | (torch.arange(len(added)) < reach)
        reach *= 2
    return added


def _decaying(added: Tensor, decay: Tensor, first: Tensor, plan: FunctionalStatePlan) -> Tensor:
    return _scan(added, decay, first, plan, torch.mul)


def _gated_sum(inputs: Given, first: Tensor, plan: FunctionalStatePlan, weights: Given) -> tuple[Tensor, Tensor]:
    sums = _decaying(inputs["x"], inputs["gate"], first, plan)
    return sums, sums


def _selective_scan(inputs: Given, first: Tensor, plan: FunctionalStatePlan, weights: Given) -> tuple[Tensor, Tensor]:
    dt = inputs["dt"].unsqueeze(-1)
    added = dt * inputs["x"].unsqueeze(-1) * inputs["b"].unsqueeze(-2)
    states = _decaying(added, (dt * weights["a"]).exp(), first, plan)
    return (states * inputs["c"].unsqueeze(-2)).sum(-1) + weights["d"] * inputs["x"], states


def _ssd(inputs: Given, first: Tensor, plan: FunctionalStatePlan, weights: Given) -> tuple[Tensor, Tensor]:
    x, dt = inputs["x"], inputs["dt"][..., None, None]
    b, c = (inputs[name].repeat_interleave(x.shape[1] // inputs[name].shape[1], dim=1) for name in ("b", "c"))
    decay = (dt * weights["a"][:, None, None]).exp()
    states = _decaying(dt * x.unsqueeze(-1) * b.unsqueeze(-2), decay, first, plan)
    return (states * c.unsqueeze(-2)).sum(-1) + weights["d"].unsqueeze(-1) * x, states


def _lightning(inputs: Given, first: Tensor, plan: FunctionalStatePlan, weights: Given) -> tuple[Tensor, Tensor]:
    added = inputs["k"].unsqueeze(-1) * inputs["v"].unsqueeze(-2)
    decay = (-weights["slope"]).exp()[:, None, None].expand(len(added), -1, 1, 1)
    states = _decaying(added, decay, first, plan)
    return (inputs["q"].unsqueeze(-1) * states).sum(-2), states


def _delta(rule: DeltaRule) -> Scan:
    def scan(inputs: Given, first: Tensor, plan: FunctionalStatePlan, weights: Given) -> tuple[Tensor, Tensor]:
        q, k, v, g, a, b = rule.terms(inputs)
        kept = torch.diag_embed(g.exp().expand_as(k)) + a.unsqueeze(-1) * b.unsqueeze(-2)
        states = _scan(k.unsqueeze(-1) * v.unsqueeze(-2), kept, first, plan, torch.matmul)
        return (q.unsqueeze(-1) * states).sum(-2), states

    return scan


_SCANS: dict[str, Scan] = {
    "gated_sum": _gated_sum,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "lightning": _lightning,
    **{name: _delta(rule) for name, rule in RULES.items() if isinstance(rule, DeltaRule)},
}


def _convolved(x: Tensor, tail: Tensor, plan: FunctionalStatePlan, weights: Given) -> tuple[Tensor, Tensor]:
    """The outputs, and the tails after each row. tail [num_reqs, past, channels]."""
    past, tokens = tail.shape[1], torch.arange(len(x))
    result = torch.zeros_like(x) + weights.get("bias", torch.zeros(()))
    for back in range(past + 1):
        own = x[(tokens - back).clamp(min=0)]
        kept = tail[plan.row, (past - back + plan.place).clamp(0, past - 1)]
        result = result + torch.where((plan.place >= back).unsqueeze(-1), own, kept) * weights["weight"][:, past - back]
    rows, after = torch.arange(len(tail)), []
    for at in range(past):
        back = past - 1 - at  # tokens before the row's last one
        own = x[(plan.last - back).clamp(min=0)]
        kept = tail[rows, (at + plan.count).clamp(max=past - 1)]
        after.append(torch.where((plan.count > back).unsqueeze(-1), own, kept))
    return result, torch.stack(after, dim=1)


def _as(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of rows or tokens, for arrays that have more dimensions."""
    return mask.view(-1, *[1] * (like.dim() - 1))
