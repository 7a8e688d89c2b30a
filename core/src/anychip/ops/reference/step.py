"""What a step program needs around the model: how its sampling draws, what it edits logits by, its scores, sums for
pooled vectors and the buffer of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.plugin_api.graph import DRAFTS, EDITS, LOGPROBS
from anychip.plugin_api.ops import Ops
from anychip.plugin_api.step import StepModel
from anychip.plugin_api.step_inputs import EmbeddingRows, EnteringRow
from anychip.plugin_api.step_outputs import Scores
from anychip.types import MAX_BIASES, MAX_LOGPROBS


@dataclass(slots=True)
class EditState:
    """What penalties and biases edit logits by, for each slot and one more that padded rows have."""

    counts: Tensor  # [max_slots + 1, vocab_size] int32, as Ops.edit_logits takes them
    bias_ids: Tensor  # [max_slots + 1, MAX_BIASES] int32
    biases: Tensor  # [max_slots + 1, MAX_BIASES] float32

    @classmethod
    def blank(cls, max_slots: int, vocab_size: int, device: torch.device | str | None = None) -> EditState:
        def zeros(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(max_slots + 1, width, dtype=dtype, device=device)

        return cls(zeros(vocab_size, torch.int32), zeros(MAX_BIASES, torch.int32), zeros(MAX_BIASES, torch.float32))

    def enter(self, rows: Sequence[EnteringRow]) -> None:
        """Replaces what the rows' slots hold, whole or a leading part at a time: no device must write by index."""
        for row in rows:
            self.counts[row.slot].copy_(torch.from_numpy(row.row_of_counts(self.counts.shape[-1])))
            if count := len(row.bias_ids):
                self.bias_ids[row.slot, :count].copy_(torch.from_numpy(row.bias_ids.copy()))
                self.biases[row.slot, :count].copy_(torch.from_numpy(row.biases.copy()))


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step's sampling drew, and the state after it."""

    ids: Tensor  # [num_samples] int32
    kept: Tensor | None  # [num_samples] bool; None in a step without drafts
    last_ids: Tensor  # [max_slots + 1] int32
    counts: Tensor  # [max_slots + 1, vocab_size] int32
    logprobs: tuple[Tensor, ...]  # of Ops.logprobs; () in a step without LOGPROBS

    def outputs(self) -> dict[str, Tensor]:
        """By field of HostOutputs."""
        names = ("chosen_logprobs", "top_ids", "top_logprobs")
        found = {"token_ids": self.ids} | dict(zip(names, self.logprobs, strict=False))
        return found if self.kept is None else found | {"kept": self.kept}


def draw_tokens(
    ops: Ops,
    logits: Tensor,
    fields: Mapping[str, Tensor],
    *,
    slots: Tensor,
    last_ids: Tensor,
    edits: EditState,
    features: Sequence[str],
    max_drafts: int,
    all_greedy: bool = False,
) -> Drawn:
    """StepProgram.sample on tensors: logits [num_samples, vocab_size] float32, slots [num_samples], the arrays of
    SamplingInputs by name, padded or not. New tables come back: not every device writes by index in place."""
    given, editing = dict(fields), EDITS in features
    drafts = None
    if DRAFTS in features:
        drafts = Drafts(given.pop("draft_ids"), given.pop("first_samples"), max_drafts)
    scored = _adjusted(ops, logits, given, slots=slots, edits=edits if editing else None, drafts=drafts)
    ids = ops.sample(logits=scored, all_greedy=all_greedy, **given)
    kept, ends, counted = None, slots, slots
    if drafts is not None:
        kept = ops.accept_drafts(ids=ids, draft_ids=drafts.ids, first_samples=drafts.first_samples)
        nobody = len(last_ids) - 1  # the slot of padded rows
        ends = torch.where(kept & (ids != drafts.ids), slots, nobody)
        counted = torch.where(kept, slots, nobody)
    return Drawn(
        ids,
        kept,
        last_ids.index_copy(0, ends.long(), ids),
        ops.count_tokens(counts=edits.counts, slots=counted, ids=ids) if editing else edits.counts,
        ops.logprobs(logits=logits, token_ids=ids, num_top=MAX_LOGPROBS) if LOGPROBS in features else (),
    )


@dataclass(frozen=True, slots=True)
class Drafts:
    """What was drafted in a step, at most `most` tokens by row."""

    ids: Tensor  # [num_samples] int32: the token drafted behind each
    first_samples: Tensor  # [num_samples] int32
    most: int

    def counts(self, ops: Ops, counts: Tensor) -> Tensor:
        """Counts by sample [num_samples, vocab_size], with the tokens drafted before each as drawn."""
        samples = torch.arange(len(counts), device=counts.device).unsqueeze(-1)
        before = samples - 1 - torch.arange(self.most, device=counts.device)  # [num_samples, most]
        is_drafted = before >= self.first_samples.unsqueeze(-1)
        ids = torch.where(is_drafted, self.ids[before.clamp(min=0)], 0)
        rows = torch.where(is_drafted, samples, len(counts))  # one more row takes what is nobody's
        extended = torch.cat((counts, counts.new_zeros(1, counts.shape[-1])))
        counted = ops.count_tokens(counts=extended, slots=rows.flatten().int(), ids=ids.flatten().int())
        return counted[:-1]


def _adjusted(
    ops: Ops,
    logits: Tensor,
    fields: dict[str, Tensor],
    *,
    slots: Tensor,
    edits: EditState | None,
    drafts: Drafts | None,
) -> Tensor:
    """Edits, then masks, where the step has any; what they take of the sampling's fields is taken out of `fields`, so
    that the rest is what Ops.sample takes. `edits` None in a step without EDITS."""
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "num_biases")
    by_sample = {name: fields.pop(name) for name in names}
    if edits is not None:
        tables = {"counts": edits.counts, "bias_ids": edits.bias_ids, "biases": edits.biases}
        if drafts is not None:  # each sample has seen other tokens: tables by sample instead of by slot
            tables = {name: table.index_select(0, slots.long()) for name, table in tables.items()}
            tables["counts"] = drafts.counts(ops, tables["counts"])
            slots = torch.arange(len(slots), dtype=slots.dtype, device=slots.device)
        logits = ops.edit_logits(logits=logits, slots=slots, **tables, **by_sample)
    return ops.apply_token_masks(logits=logits, masks=fields.pop("masks")) if "masks" in fields else logits


def pooled_sums(hidden: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows, hidden_size] float32: for each row the sum of the hidden states that StepInputs.pool_rows gives it."""
    sums = hidden.new_zeros(num_rows + 1, hidden.shape[-1], dtype=torch.float32)  # one more for those of no row
    return sums.index_add(0, rows.long(), hidden.float())[:-1]


def write_embeddings(buffer: Tensor, entering: Sequence[EmbeddingRows]) -> None:
    """StepProgram.embed in place: buffer [max_embeddings, hidden_size] float32."""
    for each in entering:
        rows = torch.from_numpy(each.rows.astype("int64")).to(buffer.device)
        buffer.index_copy_(0, rows, torch.from_numpy(each.values.copy()).to(buffer.device))


def token_scores(ops: Ops, model: StepModel, hidden: Tensor, targets: Tensor | None) -> Scores | None:
    """Of the tokens that have a target; None without targets. hidden [num_tokens, hidden_size]."""
    if targets is None:
        return None
    asked = targets >= 0
    logits = model.logits(hidden[asked]).float()
    found = ops.logprobs(logits=logits, token_ids=targets[asked], num_top=MAX_LOGPROBS)
    logprobs, top_ids, top = (values.cpu().numpy() for values in found)
    return Scores(logprobs=logprobs, top_ids=top_ids, top_logprobs=top)
