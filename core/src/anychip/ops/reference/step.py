"""What a step program of the step seam needs around the model: its sampling's changes to the logits, and its scores."""

from __future__ import annotations

from torch import Tensor

from anychip.plugin_api.ops import Ops
from anychip.plugin_api.step import MAX_LOGPROBS, Scores, StepModel


def adjusted_logits(ops: Ops, logits: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """Edits, then masks, where the sampling's fields hold any; they are taken out of `fields`."""
    if "edit_ids" in fields:
        ids, scales, shifts = (fields.pop(name) for name in ("edit_ids", "edit_scales", "edit_shifts"))
        logits = ops.edit_logits(logits=logits, ids=ids, scales=scales, shifts=shifts)
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
