"""Faults of ops and draws that are right up to a size, and wrong beyond it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import REFERENCE_OPS, sampling
from anychip.plugin_api import Rope
from anychip_conformance.faulty.registry import fault

_ROWS, _WIDTH = "op.reach_rows.{:03}", "op.reach_width.{:03}"
_VOCABULARY, _DRAWS = "op.reach_vocabulary.{:03}", "sample.reach.{:03}"

Op = Callable[..., Any]


def changed(op: str, summary: str, *, before: Op | None = None, after: Op | None = None) -> Op:
    """The reference with its arguments changed before, or its result after."""

    def override(**arguments: Any) -> Any:
        given = {**arguments, **before(**arguments)} if before else arguments
        result = REFERENCE_OPS[op](**given)
        return after(result, **arguments) if after else result

    override.__doc__ = summary
    return override


def zeroed_past(rows: int) -> Op:
    """Rows of the first result from the `rows`-th on are zeros."""

    def after(result: Any, **_: Any) -> Any:
        first, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        first = first.clone()
        first[rows:] = 0
        return first if rest is None else (first, *rest)

    return after


for _op, _field, _rows, _case in (
    ("rms_norm", "norm", 65_535, 1),
    ("residual_norm_quant", "residual-norm", 1024, 2),
    ("gated_activation", "activation", 4096, 3),
    ("gate_up_act_quant", "gate-up", 128, 4),
    ("softcap", "softcap", 65_536, 5),
    ("embedding", "embedding", 255, 6),
    ("rotary", "rotary", 65_535, 7),
    ("qkv_norm_rope", "qkv", 1025, 8),
):
    fault(f"op-{_field}-rows-past-{_rows}", "op", op=_op, killed_by=_ROWS.format(_case))(
        changed(_op, f"Rows past the {_rows:,}th of {_op} come out as zeros.", after=zeroed_past(_rows))
    )


# -- widths -----------------------------------------------------------------------------------------------------


@fault("op-norm-of-8192-columns", "op", op="rms_norm", killed_by=_WIDTH.format(1))
def norm_of_8192_columns(*, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """The mean of squares is of the first 8,192 numbers of a row."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide[..., :8192].square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.float() + unit_offset)).to(x.dtype)


@fault("op-norm-last-column", "op", op="rms_norm", killed_by=_WIDTH.format(2))
def norm_last_column(*, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """In rows of more than 4,096 numbers, what does not fill a vector of four is left out of the mean of squares."""
    wide = x.float()
    whole = wide[..., : wide.shape[-1] // 4 * 4] if wide.shape[-1] > 4096 else wide
    normed = wide * torch.rsqrt(whole.square().sum(-1, keepdim=True) / wide.shape[-1] + eps)
    return (normed * (weight.float() + unit_offset)).to(x.dtype)


def _tail_as_head(result: Tensor, **_: Any) -> Tensor:
    result = result.clone()
    result[..., 32_768:] = result[..., : max(0, result.shape[-1] - 32_768)]
    return result


fault("op-activation-columns-past-32768", "op", op="gated_activation", killed_by=_WIDTH.format(5))(
    changed("gated_activation", "Columns past the 32,768th repeat the first ones.", after=_tail_as_head)
)


def _positions(mask: int, op: str) -> Op:
    return changed(
        op,
        f"Positions are cut to {mask.bit_length()} bits.",
        before=lambda **given: {"positions": given["positions"] & mask},
    )


fault("op-rotary-positions-in-15-bits", "op", op="rotary", killed_by=_WIDTH.format(12))(_positions(0x7FFF, "rotary"))
fault("op-rotary-positions-in-20-bits-less-one", "op", op="rotary", killed_by=_WIDTH.format(12))(
    changed(
        "rotary",
        "The rotary table has 2^18 places; positions behind them turn as the last.",
        before=lambda **given: {"positions": given["positions"].clamp(max=2**18 - 2)},
    )
)
fault("op-qkv-positions-in-16-bits", "op", op="qkv_norm_rope", killed_by="attn.reach_position.001")(
    _positions(0xFFFF, "qkv_norm_rope")
)


@fault("op-rotary-64-heads", "op", op="rotary", killed_by=_WIDTH.format(8))
def rotary_64_heads(*, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Heads past the 64th do not turn."""
    turned = REFERENCE_OPS["rotary"](x=x, positions=positions, rope=rope)
    return torch.cat((turned[:, :64], x[:, 64:]), dim=1)


@fault("op-rotary-256-numbers", "op", op="rotary", killed_by=_WIDTH.format(10))
def rotary_256_numbers(*, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Numbers past the 256th of a head do not turn."""
    turned = REFERENCE_OPS["rotary"](x=x, positions=positions, rope=rope)
    return torch.cat((turned[..., :256], x[..., 256:]), dim=-1)


@fault("adapter-rank-past-128", "op", op="add_low_rank", killed_by=_WIDTH.format(16))
def rank_past_128(*, x: Tensor, y: Tensor, stack: Any, slots: Tensor) -> Tensor:
    """Ranks above 128 are cut."""
    cut = replace(stack, down=stack.down[:, :, :128], up=stack.up[:, :128])
    return REFERENCE_OPS["add_low_rank"](x=x, y=y, stack=cut, slots=slots)


@fault("adapter-slots-past-32", "op", op="add_low_rank", killed_by=_WIDTH.format(17))
def slots_past_32(*, x: Tensor, y: Tensor, stack: Any, slots: Tensor) -> Tensor:
    """Tokens whose slot is the 33rd or later have no adapter."""
    return REFERENCE_OPS["add_low_rank"](x=x, y=y, stack=stack, slots=slots.masked_fill(slots >= 32, -1))


# -- token ids --------------------------------------------------------------------------------------------------


@fault("op-embedding-ids-in-16-bits", "op", op="embedding", killed_by=_VOCABULARY.format(1))
def embedding_ids_in_16_bits(*, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    """Ids are cut to 16 bits before their row is looked up."""
    return REFERENCE_OPS["embedding"](ids=ids & 0xFFFF, weight=weight, first=first)


@fault("op-embedding-share-in-16-bits", "op", op="embedding", killed_by=_VOCABULARY.format(2))
def embedding_share_in_16_bits(*, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    """The first id of a share is cut to 16 bits."""
    return REFERENCE_OPS["embedding"](ids=ids, weight=weight, first=first & 0xFFFF)


@fault("op-mask-of-32768-tokens", "op", op="apply_token_masks", killed_by=_VOCABULARY.format(4))
def mask_of_32768_tokens(*, logits: Tensor, masks: Tensor) -> Tensor:
    """Tokens past 32,768 escape the mask."""
    masked = sampling.apply_token_masks(logits=logits, masks=masks)
    return torch.cat((masked[:, :32_768], logits[:, 32_768:]), dim=-1)


@fault("op-mask-of-64-rows", "op", op="apply_token_masks", killed_by=_ROWS.format(10))
def mask_of_64_rows(*, logits: Tensor, masks: Tensor) -> Tensor:
    """Rows past the 64th have no mask."""
    masked = sampling.apply_token_masks(logits=logits, masks=masks)
    return torch.cat((masked[:64], logits[64:]))


fault("op-softcap-of-65536-ids", "op", op="softcap", killed_by=_VOCABULARY.format(3))(
    changed(
        "softcap",
        "Numbers past the 65,536th of a row are not capped.",
        after=lambda result, x, cap: torch.cat((result[..., :65_536], x[..., 65_536:]), dim=-1),
    )
)


@fault("op-biases-of-16-bit-ids", "op", op="edit_logits", killed_by=_VOCABULARY.format(5))
def biases_of_16_bit_ids(*, bias_ids: Tensor, **rest: Any) -> Tensor:
    """A bias goes to its id's lower 16 bits."""
    return sampling.edit_logits(bias_ids=bias_ids & 0xFFFF, **rest)


@fault("op-penalties-of-131072-ids", "op", op="edit_logits", killed_by=_VOCABULARY.format(5))
def penalties_of_131072_ids(*, counts: Tensor, **rest: Any) -> Tensor:
    """Tokens past 131,072 are not penalized."""
    counts = counts.clone()
    counts[:, 131_072:] = 0
    return sampling.edit_logits(counts=counts, **rest)


@fault("op-counts-read-as-bytes", "op", op="edit_logits", killed_by=_VOCABULARY.format(6))
def counts_read_as_bytes(*, counts: Tensor, **rest: Any) -> Tensor:
    """Counts above 255 are penalized as 255."""
    return sampling.edit_logits(counts=counts.clamp(max=255), **rest)


@fault("op-counts-in-16-bits", "op", op="count_tokens", killed_by=_VOCABULARY.format(8))
def counts_in_16_bits(*, counts: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
    """Counts end at 65,535."""
    return sampling.count_tokens(counts=counts, slots=slots, ids=ids).clamp(max=65_535)


@fault("op-counts-of-16-bit-ids", "op", op="count_tokens", killed_by=_VOCABULARY.format(7))
def counts_of_16_bit_ids(*, counts: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
    """A drawn token counts for its lower 16 bits."""
    return sampling.count_tokens(counts=counts, slots=slots, ids=ids & 0xFFFF)


@fault("op-drafts-of-128-samples", "op", op="accept_drafts", killed_by=_ROWS.format(13))
def drafts_of_128_samples(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """Samples past the 128th are all kept."""
    kept = sampling.accept_drafts(ids=ids, draft_ids=draft_ids, first_samples=first_samples)
    kept[128:] = True
    return kept


# -- draws ------------------------------------------------------------------------------------------------------


@fault("sample-ids-in-16-bits", "op", op="sample", killed_by=_DRAWS.format(1))
def ids_in_16_bits(**given: Any) -> Tensor:
    """Sampled ids are cut to 16 bits."""
    return sampling.sample(**given) & 0xFFFF


@fault("sample-greedy-of-131072-ids", "op", op="sample", killed_by=_DRAWS.format(1))
def greedy_of_131072_ids(*, logits: Tensor, **rest: Any) -> Tensor:
    """Logits past the 131,072nd are not looked at."""
    return sampling.sample(logits=logits[:, :131_072], **rest)


@fault("sample-rest-of-a-tile", "op", op="sample", killed_by=_DRAWS.format(2))
def rest_of_a_tile(*, logits: Tensor, **rest: Any) -> Tensor:
    """Of vocabularies above 1,024 ids, what does not fill a tile of 32 is never drawn."""
    width = logits.shape[1]
    return sampling.sample(logits=logits if width <= 1024 else logits[:, : width // 32 * 32], **rest)


@fault("sample-rows-past-64", "op", op="sample", killed_by=_DRAWS.format(7))
def rows_past_64(*, logits: Tensor, **rest: Any) -> Tensor:
    """Rows past the 64th draw as the row 64 before them."""
    ids = sampling.sample(logits=logits, **rest)
    return ids[torch.arange(len(ids)) % 64]


@fault("sample-greedy-rows-past-512", "op", op="sample", killed_by=_DRAWS.format(6))
def greedy_rows_past_512(*, logits: Tensor, **rest: Any) -> Tensor:
    """Rows past the 512th draw id 0."""
    ids = sampling.sample(logits=logits, **rest)
    ids[512:] = 0
    return ids


@fault("sample-position-in-16-bits", "op", op="sample", killed_by=_DRAWS.format(10))
def position_in_16_bits(*, position: Tensor, **rest: Any) -> Tensor:
    """Positions are cut to 16 bits in the draw's counter."""
    return sampling.sample(position=position & 0xFFFF, **rest)


@fault("sample-top-k-past-128", "op", op="sample", killed_by=_DRAWS.format(11))
def top_k_past_128(*, top_k: Tensor, **rest: Any) -> Tensor:
    """No top_k is above 128."""
    return sampling.sample(top_k=top_k.clamp(max=128), **rest)


@fault("sample-likeliest-ids-in-16-bits", "op", op="logprobs", killed_by=_DRAWS.format(5))
def likeliest_ids_in_16_bits(*, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest ids are cut to 16 bits."""
    chosen, ids, top = sampling.logprobs(logits=logits, token_ids=token_ids, num_top=num_top)
    return chosen, ids & 0xFFFF, top


@fault("sample-logprobs-of-16-bit-ids", "op", op="logprobs", killed_by=_DRAWS.format(5))
def logprobs_of_16_bit_ids(*, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen token's log-probability is that of its lower 16 bits."""
    return sampling.logprobs(logits=logits, token_ids=token_ids & 0xFFFF, num_top=num_top)


@fault("sample-likeliest-past-64", "op", op="logprobs", killed_by=_DRAWS.format(12))
def likeliest_past_64(*, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """From the 65th on, the likeliest ids repeat the first."""
    chosen, ids, top = sampling.logprobs(logits=logits, token_ids=token_ids, num_top=num_top)
    place = torch.arange(ids.shape[1]) % 64
    return chosen, ids[:, place], top[:, place]


@fault("sample-logprobs-rows-past-256", "op", op="logprobs", killed_by=_DRAWS.format(9))
def logprobs_rows_past_256(*, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows past the 256th have the log-probabilities of the row before."""
    chosen, ids, top = sampling.logprobs(logits=logits, token_ids=token_ids, num_top=num_top)
    row = torch.arange(len(logits)).clamp(max=255)
    return chosen[row], ids[row], top[row]


@fault("sample-1024th-draw", "op of a rank", op="sample", killed_by="sample.calls.001")
def draw_1024(platform: Any) -> Op:
    """Draws are numbered, and the number runs over: from the 1,025th call on, positions are one too large."""
    calls = [0]

    def sample(*, position: Tensor, **rest: Any) -> Tensor:
        calls[0] += 1
        return sampling.sample(position=position + (calls[0] > 1024), **rest)

    return sample
