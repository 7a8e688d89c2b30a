"""What a step program needs around the model: what its sampling edits logits by, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.plugin_api.ops import Ops
from anychip.plugin_api.step import EnteringRow, Scores, StepModel
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


def adjusted_logits(
    ops: Ops, logits: Tensor, fields: dict[str, Tensor], *, slots: Tensor, edits: EditState | None
) -> Tensor:
    """Edits, then masks, where the step has any; what they take of the sampling's fields is taken out of `fields`, so
    that the rest is what Ops.sample takes. slots [rows]; `edits` None in a step without EDITS."""
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "num_biases")
    by_row = {name: fields.pop(name) for name in names}
    if edits is not None:
        by_slot = {"counts": edits.counts, "bias_ids": edits.bias_ids, "biases": edits.biases}
        logits = ops.edit_logits(logits=logits, slots=slots, **by_slot, **by_row)
    return ops.apply_token_masks(logits=logits, masks=fields.pop("masks")) if "masks" in fields else logits


def token_scores(ops: Ops, model: StepModel, hidden: Tensor, targets: Tensor | None) -> Scores | None:
    """Of the tokens that have a target; None without targets. hidden [num_tokens, hidden_size]."""
    if targets is None:
        return None
    asked = targets >= 0
    logits = model.logits(hidden[asked]).float()
    found = ops.logprobs(logits=logits, token_ids=targets[asked], num_top=MAX_LOGPROBS)
    logprobs, top_ids, top = (values.cpu().numpy() for values in found)
    return Scores(logprobs=logprobs, top_ids=top_ids, top_logprobs=top)
