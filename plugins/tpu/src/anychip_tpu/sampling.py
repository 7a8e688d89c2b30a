"""Draws without sorting: thresholds are found by cutting the range of weights, and ties go to the lower id."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.ops.reference.philox import PURPOSE_TOKEN, uniform
from anychip.plugin_api import op_override

_PARTS, _ROUNDS = 16, 16
"""A range of weights is cut into so many parts, so often: by 64 bits in all, after which nothing lies between its ends
that float64 tells apart from them. A round reads the weights once for all parts."""


@op_override("sample", version=1)
def sample(
    *,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed_low: Tensor,
    seed_high: Tensor,
    sample_index: Tensor,
    position: Tensor,
    all_greedy: bool = False,
) -> Tensor:
    greedy_ids = logits.argmax(dim=-1).clamp(max=logits.shape[-1] - 1)
    if all_greedy:
        return greedy_ids.to(torch.int32)
    greedy = temperature == 0
    scaled = logits.double() / torch.where(greedy, 1.0, temperature.double()).unsqueeze(-1)
    weights = truncated(torch.softmax(scaled, dim=-1), top_k=top_k, top_p=top_p, min_p=min_p)
    cumulative = weights.cumsum(dim=-1)
    target = uniform(seed_low, seed_high, sample_index, position, PURPOSE_TOKEN) * cumulative[:, -1]
    drawn = (cumulative <= target.unsqueeze(-1)).sum(dim=-1)
    # A target that rounding put at the total falls on the last token that has weight.
    ids = torch.arange(logits.shape[-1], device=logits.device)
    last = torch.where(weights > 0, ids, 0).amax(dim=-1)
    return torch.where(greedy, greedy_ids, torch.minimum(drawn, last)).to(torch.int32)


def truncated(probs: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """As the reference's `truncate`: probabilities [rows, vocab_size] float64 with what top-k, top-p and min-p exclude
    set to zero."""
    count = torch.where(top_k > 0, top_k, probs.shape[-1]).double()
    probs = _leading(probs, count, torch.ones_like(probs))
    total = probs.sum(dim=-1)
    # A row that keeps everything must not lose its tail to the rounding of its total.
    mass = torch.where(top_p < 1, top_p.double() * total, torch.inf)
    probs = _leading(probs, mass, probs)
    return torch.where(probs < min_p.double().unsqueeze(-1) * probs.amax(dim=-1, keepdim=True), 0.0, probs)


def _leading(probs: Tensor, most: Tensor, measure: Tensor) -> Tensor:
    """Each row's leading tokens by rank, the lower id first among equals: a token stays while the measure of those
    before it is less than `most` [rows]. `measure` [rows, vocab_size] is one number for tokens of equal weight."""
    most = most.unsqueeze(-1)

    # What lies above `high` measures less than `most`; what lies above `low`, as much or more.
    low, high = torch.full_like(most, -1.0), probs.amax(dim=-1, keepdim=True)
    steps = torch.arange(1, _PARTS, device=probs.device) / _PARTS
    for _ in range(_ROUNDS):
        cuts = low + (high - low) * steps  # [rows, _PARTS - 1], rising
        measured = torch.where(probs.unsqueeze(1) > cuts.unsqueeze(-1), measure.unsqueeze(1), 0.0).sum(dim=-1)
        much = measured >= most
        low = torch.maximum(low, torch.where(much, cuts, -1.0).amax(dim=-1, keepdim=True))
        high = torch.minimum(high, torch.where(much, torch.inf, cuts).amin(dim=-1, keepdim=True))
    threshold = torch.where(probs > low, probs, torch.inf).amin(dim=-1, keepdim=True)
    tied = probs == threshold
    places = tied.to(torch.int32).cumsum(dim=-1) - 1
    each = torch.where(tied, measure, 0.0).amax(dim=-1, keepdim=True)
    above = torch.where(probs > threshold, measure, 0.0).sum(dim=-1, keepdim=True)
    kept = (probs > threshold) | (tied & (above + places * each < most))
    return torch.where(kept, probs, 0.0)
