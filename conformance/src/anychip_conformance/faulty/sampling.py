"""Faults of sampling and log-probabilities. A draw that is wrong for one row or one purpose is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import sampling
from anychip.plugin_api import Platform
from anychip_conformance.faulty.registry import fault


@fault("sample-tie-admits-one-more", "op", op="sample", killed_by="sample.ties.001")
def tie_admits_one_more(*, logits: Tensor, top_p: Tensor, **rest: Any) -> Tensor:
    """A sum that reaches top_p exactly lets the next token in."""
    return sampling.sample(logits=logits, top_p=top_p + 1e-6, **rest)


@fault("sample-one-seed-for-all", "op", op="sample", killed_by="sample.draw.001")
def one_seed_for_all(*, logits: Tensor, seed_low: Tensor, seed_high: Tensor, **rest: Any) -> Tensor:
    """Every row draws with the first row's seed."""
    rows = len(logits)
    return sampling.sample(
        logits=logits, seed_low=seed_low[:1].expand(rows), seed_high=seed_high[:1].expand(rows), **rest
    )


@fault("sample-seed-cut-to-32-bits", "op", op="sample", killed_by="sample.draw.001")
def seed_cut(*, logits: Tensor, seed_high: Tensor, **rest: Any) -> Tensor:
    """The upper half of the seed is left out."""
    return sampling.sample(logits=logits, seed_high=torch.zeros_like(seed_high), **rest)


@fault("sample-index-ignored", "op", op="sample", killed_by="sample.draw.001")
def index_ignored(*, logits: Tensor, sample_index: Tensor, **rest: Any) -> Tensor:
    """All n sequences of a request draw the same."""
    return sampling.sample(logits=logits, sample_index=torch.zeros_like(sample_index), **rest)


@fault("sample-position-ignored", "op", op="sample", killed_by="sample.draw.001")
def position_ignored(*, logits: Tensor, position: Tensor, **rest: Any) -> Tensor:
    """Every token of a request is drawn with the same number."""
    return sampling.sample(logits=logits, position=torch.zeros_like(position), **rest)


@fault("sample-draw-by-place-in-batch", "op", op="sample", killed_by="sample.cotenants.001")
def draw_by_place(*, logits: Tensor, sample_index: Tensor, **rest: Any) -> Tensor:
    """The row's place in the batch enters the draw."""
    place = torch.arange(len(logits), dtype=sample_index.dtype)
    return sampling.sample(logits=logits, sample_index=sample_index + place, **rest)


@fault("sample-min-p-of-one", "op", op="sample", killed_by="sample.truncation.003")
def min_p_of_one(*, logits: Tensor, temperature: Tensor, min_p: Tensor, **rest: Any) -> Tensor:
    """min-p is relative to one instead of to the likeliest token."""
    scaled = logits.double() / torch.where(temperature == 0, 1.0, temperature.double()).unsqueeze(-1)
    best = scaled.softmax(dim=-1).amax(dim=-1)
    return sampling.sample(logits=logits, temperature=temperature, min_p=(min_p / best).clamp(max=1.0).float(), **rest)


@fault("sample-top-p-before-top-k", "op", op="sample", killed_by="sample.truncation.004")
def top_p_before_top_k(*, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, **rest: Any) -> Tensor:
    """top-p counts tokens that top-k excludes."""
    scaled = logits.double() / torch.where(temperature == 0, 1.0, temperature.double()).unsqueeze(-1)
    off = torch.zeros_like(rest["min_p"])
    kept = sampling.truncate(scaled.softmax(dim=-1), top_k=torch.zeros_like(top_k), top_p=top_p, min_p=off)
    masked = logits.masked_fill(kept == 0, -torch.inf)
    return sampling.sample(logits=masked, temperature=temperature, top_k=top_k, top_p=torch.ones_like(top_p), **rest)


@fault("sample-top-k-one-more", "op", op="sample", killed_by="sample.ties.003")
def top_k_one_more(*, logits: Tensor, top_k: Tensor, **rest: Any) -> Tensor:
    """One token more than k."""
    return sampling.sample(logits=logits, top_k=torch.where(top_k > 0, top_k + 1, top_k), **rest)


@fault("sample-zero-temperature-draws", "op", op="sample", killed_by="sample.greedy.001")
def zero_temperature_draws(*, logits: Tensor, temperature: Tensor, **rest: Any) -> Tensor:
    """Temperature zero is taken for one."""
    return sampling.sample(logits=logits, temperature=torch.where(temperature == 0, 1.0, temperature),
                           **{**rest, "all_greedy": False})  # fmt: skip


@fault("sample-temperature-multiplies", "op", op="sample", killed_by="sample.draw.002")
def temperature_multiplies(*, logits: Tensor, temperature: Tensor, **rest: Any) -> Tensor:
    """Logits are multiplied by the temperature."""
    return sampling.sample(logits=logits, temperature=torch.where(temperature == 0, 0.0, 1 / temperature), **rest)


@fault("sample-ranks-draw-apart", "op of a rank", op="sample", killed_by="e2e.sampled.001")
def ranks_draw_apart(platform: Platform) -> Callable[..., Tensor]:
    """Each rank draws with a seed of its own."""
    rank = platform.context.device_indexes[0]

    def sample(*, logits: Tensor, seed_low: Tensor, **rest: Any) -> Tensor:
        return sampling.sample(logits=logits, seed_low=seed_low + rank, **rest)

    return sample


@fault("logprobs-not-normalised", "op", op="logprobs", killed_by="sample.logprobs.001")
def not_normalised(*, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits are reported for log-probabilities."""
    chosen = logits.gather(-1, token_ids.long().unsqueeze(-1)).squeeze(-1)
    top, ids = logits.topk(num_top, dim=-1)
    return chosen, ids.to(torch.int32), top


@fault("logprobs-unordered", "op", op="logprobs", killed_by="sample.logprobs.001")
def unordered(*, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens come in the order of their ids."""
    chosen, ids, top = sampling.logprobs(logits=logits, token_ids=token_ids, num_top=num_top)
    order = ids.argsort(dim=-1)
    return chosen, ids.gather(-1, order), top.gather(-1, order)
