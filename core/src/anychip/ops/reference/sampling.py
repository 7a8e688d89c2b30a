"""Reference of the sampling ops: edits and counts, masks, the seeded draw, log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.ops.reference.philox import PURPOSE_TOKEN, uniform
from anychip.plugin_api.step_inputs import DRAWN


def apply_token_masks(*, logits: Tensor, masks: Tensor) -> Tensor:
    bits = torch.ones(32, dtype=torch.int32, device=masks.device) << torch.arange(32, device=masks.device)
    allowed = (masks.unsqueeze(-1) & bits).flatten(1)[:, : logits.shape[-1]]
    return logits.masked_fill(allowed == 0, -torch.inf)


def edit_logits(
    *,
    logits: Tensor,
    slots: Tensor,
    counts: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
    bias_ids: Tensor,
    biases: Tensor,
    num_biases: Tensor,
) -> Tensor:
    slots, factor = slots.long(), repetition_penalty.unsqueeze(-1)
    count = counts.index_select(0, slots)  # [rows, vocab_size]
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    drawn = count // DRAWN
    taken = frequency_penalty.unsqueeze(-1) * drawn + torch.where(drawn > 0, presence_penalty.unsqueeze(-1), 0)
    penalized = torch.where(count > 0, repeated, logits) - taken
    columns = torch.arange(bias_ids.shape[-1], device=logits.device)
    # Adding -0.0 changes no bit.
    added = torch.where(columns < num_biases.unsqueeze(-1), biases.index_select(0, slots), -0.0)
    return penalized.scatter_add(-1, bias_ids.index_select(0, slots).long(), added)


def count_tokens(*, counts: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
    # A new table: not every device writes by index in place.
    return counts.index_put((slots.long(), ids.long()), counts.new_full((), DRAWN), accumulate=True)


def accept_drafts(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    missed = (ids != draft_ids).to(torch.int32)
    before = missed.cumsum(0) - missed  # by sample: how many before it missed their drafts, over all rows
    return before == before.index_select(0, first_samples.long())


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
    greedy_ids = logits.argmax(dim=-1)
    if all_greedy:
        return greedy_ids.to(torch.int32)
    greedy = temperature == 0
    scaled = logits.double() / torch.where(greedy, 1.0, temperature.double()).unsqueeze(-1)
    weights = truncate(torch.softmax(scaled, dim=-1), top_k=top_k, top_p=top_p, min_p=min_p)
    cumulative = weights.cumsum(dim=-1)
    target = uniform(seed_low, seed_high, sample_index, position, PURPOSE_TOKEN) * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)
    # A target that rounding put at the total falls on the last token that has weight.
    last = logits.shape[-1] - 1 - weights.flip(-1).gt(0).to(torch.int8).argmax(dim=-1)
    drawn = torch.minimum(drawn, last)
    return torch.where(greedy, greedy_ids, drawn).to(torch.int32)


def truncate(probs: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities [rows, vocab_size] with what top-k, top-p and min-p exclude set to zero; not renormalised.

    Tokens are ranked by probability, the lower id first among equals. top-k keeps the first k; top-p keeps, of
    those renormalised, the shortest run whose sum reaches p; min-p keeps what is at least min_p times the best.
    """
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    ranked = ranked.masked_fill((top_k.unsqueeze(-1) > 0) & (rank >= top_k.unsqueeze(-1)), 0)
    total = ranked.sum(dim=-1, keepdim=True)
    before = ranked.cumsum(dim=-1) - ranked
    ranked = ranked.masked_fill(before >= top_p.double().unsqueeze(-1) * total, 0)
    ranked = ranked.masked_fill(ranked < min_p.double().unsqueeze(-1) * ranked[:, :1], 0)
    return torch.zeros_like(probs).scatter(-1, order, ranked)


def logprobs(*, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    chosen = log_probs.gather(-1, token_ids.long().unsqueeze(-1)).squeeze(-1)
    top, top_ids = log_probs.topk(min(num_top, logits.shape[-1]), dim=-1)
    return chosen, top_ids.to(torch.int32), top
