"""Faults of single and composite ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference import REFERENCE_OPS, functional, sampling
from anychip.plugin_api import ActFormat, QKNorm, Rope
from anychip_conformance.faulty.registry import fault


@fault("op-residual-not-updated", "op", op="residual_norm_quant", killed_by="op.residual_norm.001")
def residual_not_updated(
    *, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool = False,
    out_format: ActFormat | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The norm is of the sum, and the residual stays what it was."""
    normed, total = REFERENCE_OPS["residual_norm_quant"](
        x=x, residual=residual, weight=weight, eps=eps, unit_offset=unit_offset
    )
    return normed, total if residual is None else residual


@fault("op-norm-of-x-alone", "op", op="residual_norm_quant", killed_by="op.residual_norm.001")
def norm_of_x_alone(
    *, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool = False,
    out_format: ActFormat | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual is updated, and the norm does not see it."""
    total = x if residual is None else x + residual
    return functional.rms_norm(x=x, weight=weight, eps=eps, unit_offset=unit_offset), total


@fault("op-rotary-styles-swapped", "op", op="rotary", killed_by="op.rotary.001")
def rotary_styles_swapped(*, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Halves turn where neighbours should, and the other way round."""
    swapped = Rope(cos=rope.cos, sin=rope.sin, rotary_dim=rope.rotary_dim, interleaved=not rope.interleaved)
    return functional.rotary(x=x, positions=positions, rope=swapped)


@fault("op-rotary-turns-all", "op", op="rotary", killed_by="op.rotary.007")
def rotary_turns_all(*, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """What lies past rotary_dim is dropped to zero instead of passing."""
    turned = functional.rotary(x=x, positions=positions, rope=rope)
    turned[..., rope.rotary_dim :] = 0
    return turned


@fault("op-rotary-in-bf16", "op", op="rotary", killed_by="op.rotary.001")
def rotary_in_bf16(*, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Sines and cosines are kept in bfloat16."""
    narrow = Rope(cos=rope.cos.bfloat16().float(), sin=rope.sin.bfloat16().float(), rotary_dim=rope.rotary_dim)
    narrow.interleaved = rope.interleaved
    return functional.rotary(x=x, positions=positions, rope=narrow)


@fault("op-query-norm-for-keys", "op", op="qkv_norm_rope", killed_by="op.qkv_norm_rope.001")
def query_norm_for_keys(
    *, q: Tensor, k: Tensor | None, positions: Tensor, rope: Rope | None, qk_norm: QKNorm | None
) -> tuple[Tensor, Tensor | None]:
    """Keys are scaled by the queries' weight."""
    if qk_norm is not None:
        qk_norm = QKNorm(
            q_weight=qk_norm.q_weight, k_weight=qk_norm.q_weight, eps=qk_norm.eps, unit_offset=qk_norm.unit_offset
        )
    return REFERENCE_OPS["qkv_norm_rope"](q=q, k=k, positions=positions, rope=rope, qk_norm=qk_norm)


@fault("op-norm-in-bf16", "op", op="rms_norm", killed_by="op.rms_norm.008")
def norm_in_bf16(*, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Squares are summed in the input's dtype."""
    total = torch.zeros(*x.shape[:-1], 1, dtype=x.dtype)
    for column in range(0, x.shape[-1], 8):
        total = total + x[..., column : column + 8].square().sum(dim=-1, keepdim=True)
    factor = weight + 1 if unit_offset else weight
    return (x * torch.rsqrt(total / x.shape[-1] + eps) * factor).to(x.dtype)


@fault("op-unit-offset-ignored", "op", op="rms_norm", killed_by="op.rms_norm.004")
def unit_offset_ignored(*, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """The weight is never increased by one."""
    return functional.rms_norm(x=x, weight=weight, eps=eps)


@fault("op-eps-ignored", "op", op="rms_norm", killed_by="op.rms_norm.drawn")
def eps_ignored(*, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Small rows are scaled up as if eps were zero."""
    return functional.rms_norm(x=x, weight=weight, eps=0.0, unit_offset=unit_offset)


@fault("op-gelu-by-erf", "op", op="gated_activation", killed_by="op.gated_activation.007")
def gelu_by_erf(*, gate_up: Tensor, activation: str) -> Tensor:
    """The exact gelu where the tanh form is asked for."""
    if activation != "gelu_tanh":
        return functional.gated_activation(gate_up=gate_up, activation=activation)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


@fault("op-gate-and-up-swapped", "op", op="gated_activation", killed_by="op.gated_activation.001")
def gate_and_up_swapped(*, gate_up: Tensor, activation: str) -> Tensor:
    """The second half is taken for the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gated_activation(gate_up=torch.cat((up, gate), dim=-1), activation=activation)


@fault("op-swiglu-unclamped", "op", op="gated_activation", killed_by="op.gated_activation.016")
def swiglu_unclamped(*, gate_up: Tensor, activation: str) -> Tensor:
    """No limit of seven."""
    if activation != "swiglu_clamped":
        return functional.gated_activation(gate_up=gate_up, activation=activation)
    gate, up = gate_up.chunk(2, dim=-1)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@fault("op-softcap-clips", "op", op="softcap", killed_by="op.softcap.001")
def softcap_clips(*, x: Tensor, cap: float) -> Tensor:
    """Values are cut off at the cap instead of bent towards it."""
    return x.clamp(-cap, cap)


@fault("op-embedding-wraps", "op", op="embedding", killed_by="op.embedding.007")
def embedding_wraps(*, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    """Ids below this rank's share count from its end."""
    local = ids.long() - first
    held = local < len(weight)
    return weight[local.where(held, 0) % len(weight)] * held.unsqueeze(-1)


@fault("op-embedding-off-by-one", "op", op="embedding", killed_by="op.embedding.001")
def embedding_off_by_one(*, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    """The last id of a share is taken to be another's."""
    result = functional.embedding(ids=ids, weight=weight, first=first)
    return result.masked_fill((ids == first + len(weight) - 1).unsqueeze(-1), 0)


@fault("op-mask-bits-reversed", "op", op="apply_token_masks", killed_by="op.token_masks.002")
def mask_bits_reversed(*, logits: Tensor, masks: Tensor) -> Tensor:
    """Token i stands in bit 31 - i % 32."""
    token = torch.arange(logits.shape[-1])
    allowed = (masks[:, token // 32] >> (31 - token % 32)) & 1
    return logits.masked_fill(allowed == 0, -torch.inf)


@fault("op-mask-of-the-first-row", "op", op="apply_token_masks", killed_by="step.masks.001")
def mask_of_the_first_row(*, logits: Tensor, masks: Tensor) -> Tensor:
    """The first row's mask holds for all."""
    return sampling.apply_token_masks(logits=logits, masks=masks[:1].expand(len(logits), -1))


@fault("op-edits-divide-always", "op", op="edit_logits", killed_by="op.edit_logits.003")
def edits_divide_always(*, logits: Tensor, repetition_penalty: Tensor, **edits: Tensor) -> Tensor:
    """A negative logit is divided by its penalty too: it becomes a reward."""
    turned = sampling.edit_logits(logits=logits.abs(), repetition_penalty=repetition_penalty, **_no_taking(edits))
    divided = turned * logits.sign()
    ones = torch.ones_like(repetition_penalty)
    return sampling.edit_logits(logits=divided, repetition_penalty=ones, **edits)


def _no_taking(edits: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("presence_penalty", "frequency_penalty", "num_biases")
    return edits | {name: torch.zeros_like(edits[name]) for name in names}


@fault("op-edits-presence-of-the-prompt", "op", op="edit_logits", killed_by="op.edit_logits.003")
def presence_of_the_prompt(*, counts: Tensor, **edits: Tensor) -> Tensor:
    """Tokens of the prompt count as output."""
    return sampling.edit_logits(counts=counts + counts % 2, **edits)


@fault("op-edits-biases-of-the-last-owner", "op", op="edit_logits", killed_by="op.edit_logits.003")
def biases_of_the_last_owner(*, num_biases: Tensor, logits: Tensor, **edits: Tensor) -> Tensor:
    """All biases that a slot ever had are added."""
    every = torch.full_like(num_biases, min(logits.shape[-1], edits["bias_ids"].shape[-1]))
    return sampling.edit_logits(logits=logits, num_biases=every, **edits)


@fault("op-edits-counts-of-the-first-row", "op", op="edit_logits", killed_by="op.edit_logits.003")
def counts_of_the_first_row(*, slots: Tensor, counts: Tensor, **edits: Tensor) -> Tensor:
    """The first row's counts hold for all."""
    return sampling.edit_logits(slots=slots, counts=counts[slots[:1].long()].expand_as(counts), **edits)


@fault("op-counts-a-pair-once", "op", op="count_tokens", killed_by="op.count_tokens.001")
def counts_a_pair_once(*, counts: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
    """A pair that is there twice counts once."""
    where = (slots.long(), ids.long())
    return counts.index_put(where, counts[where] + 2)


@fault("op-accepts-after-a-miss", "op", op="accept_drafts", killed_by="op.accept_drafts.002")
def accepts_after_a_miss(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """A sample is kept where the one before it drew its draft, whatever came before that."""
    samples = torch.arange(len(ids))
    return (samples == first_samples) | torch.cat((torch.ones(1, dtype=torch.bool), (ids == draft_ids)[:-1]))


@fault("op-accepts-one-too-many", "op", op="accept_drafts", killed_by="op.accept_drafts.002")
def accepts_one_too_many(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """The sample behind the first miss is kept as well."""
    kept = sampling.accept_drafts(ids=ids, draft_ids=draft_ids, first_samples=first_samples)
    same_row = torch.arange(len(ids)) > first_samples
    return kept | (same_row & torch.cat((kept[:1], kept[:-1])))


@fault("op-accepts-one-too-few", "op", op="accept_drafts", killed_by="op.accept_drafts.002")
def accepts_one_too_few(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """The draw behind the last draft that was right is lost."""
    kept = sampling.accept_drafts(ids=ids, draft_ids=draft_ids, first_samples=first_samples)
    return kept & ((ids == draft_ids) | (torch.arange(len(ids)) == first_samples))


@fault("op-accepts-by-the-rows-before", "op", op="accept_drafts", killed_by="op.accept_drafts.003")
def accepts_by_the_rows_before(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """A miss in one row ends the drafts of the rows behind it."""
    missed = (ids != draft_ids) & (draft_ids >= 0)
    return (missed.cumsum(0) - missed.int() == 0) | (torch.arange(len(ids)) == first_samples)


@fault("op-accepts-the-next-draft", "op", op="accept_drafts", killed_by="op.accept_drafts.003")
def accepts_the_next_draft(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """A draw is held against the draft of the sample behind it."""
    return sampling.accept_drafts(ids=ids, draft_ids=draft_ids.roll(-1), first_samples=first_samples)


@fault("op-accepts-everything", "op", op="accept_drafts", killed_by="op.accept_drafts.002")
def accepts_everything(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """Every sample is kept."""
    return torch.ones(len(ids), dtype=torch.bool)


@fault("op-accepts-right-drafts-alone", "op", op="accept_drafts", killed_by="op.accept_drafts.001")
def accepts_right_drafts_alone(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """What is drawn in place of a draft, or behind the last one, is not kept."""
    return sampling.accept_drafts(ids=ids, draft_ids=draft_ids, first_samples=first_samples) & (ids == draft_ids)


@fault("op-accepts-a-draft-of-another-place", "op", op="accept_drafts", killed_by="op.accept_drafts.003")
def accepts_a_draft_of_another_place(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """A draw is right where its id is drafted anywhere in its row."""
    same_row = first_samples.unsqueeze(0) == first_samples.unsqueeze(1)
    right = (same_row & (ids.unsqueeze(1) == draft_ids.unsqueeze(0))).any(dim=1)
    return sampling.accept_drafts(ids=ids, draft_ids=torch.where(right, ids, -1), first_samples=first_samples)


@fault("op-accepts-by-sixteen-bits", "op", op="accept_drafts", killed_by="op.accept_drafts.003")
def accepts_by_sixteen_bits(*, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
    """Ids are compared by their low sixteen bits."""
    return sampling.accept_drafts(ids=ids.short(), draft_ids=draft_ids.short(), first_samples=first_samples)


@fault("op-matmul-not-reduced", "op", op="matmul_reduce", killed_by="e2e.tensor_parallel.001")
def matmul_not_reduced(*, x: Tensor, kernel: Any, packed: Any, communicator: Any) -> Tensor:
    """The sum over ranks is left out."""
    result: Tensor = kernel.apply(x, packed)
    return result
