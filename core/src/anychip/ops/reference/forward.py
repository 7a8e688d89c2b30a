"""The forward pass of a step as a function of tensors: what a step program traces, compiles, or just calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference.step import pooled_sums
from anychip.plugin_api.adapters import AdapterStack, StepAdapters, takes_head_adapters
from anychip.plugin_api.forward_context import ForwardContext
from anychip.plugin_api.forward_extras import ForwardExtras
from anychip.plugin_api.ops import Ops
from anychip.plugin_api.step import StepModel
from anychip.types import MAX_LOGPROBS


@dataclass(frozen=True, slots=True)
class Passed:
    """What a forward pass gives, padding included."""

    caches: list[Tensor]  # by layer
    logits: Tensor  # [num_samples, vocab_size]
    scores: tuple[Tensor, ...] = ()  # by token, of which those with a target count; () in a step without SCORES
    pooled: Tensor | None = None  # [num_reqs, hidden_size]
    taps: tuple[Tensor, ...] = ()  # by layer of StepLimits.taps, [num_tokens, hidden_size]

    def flat(self) -> tuple[object, ...]:
        """For programs that can return tensors, and lists of them, only."""
        return self.caches, self.logits, list(self.scores), [] if self.pooled is None else [self.pooled], [*self.taps]

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> Passed:
        caches, logits, scores, pooled, taps = flat
        return cls(caches, logits, tuple(scores), pooled[0] if pooled else None, tuple(taps))


def forward_pass(
    model: StepModel,
    ops: Ops,
    plans: Sequence[Any],
    layer_groups: Sequence[int],
    caches: Sequence[Tensor],
    last_ids: Tensor,
    fields: Mapping[str, Tensor],
    *,
    tap_layers: Sequence[int] = (),
    embeddings: Tensor | None = None,
    stacks: Sequence[AdapterStack] = (),
) -> Passed:
    """Reads no value on the host, and its shapes follow from its arguments'. `plans` by KV group, `caches` by layer,
    last_ids [max_slots + 1] int32, `fields` the step's arrays on the device, `embeddings` the buffer of embeddings
    and `stacks` the adapters by site, where the program has them."""
    ids = fields["input_ids"]
    ids = torch.where(ids < 0, last_ids[fields["token_slots"]], ids)
    extras = ForwardExtras.of(fields, tap_layers=tap_layers, embeddings=embeddings)
    slots = fields.get("adapter_slots")
    adapters = None if slots is None else StepAdapters(slots, stacks)
    context = ForwardContext(plans, list(caches), layer_groups, extras=extras, adapters=adapters)
    hidden = model.forward(ids, fields["positions"], context)
    logits = logits_of(model, hidden, adapters, fields["logits_indices"])
    scores: tuple[Tensor, ...] = ()
    if "score_targets" in fields:
        targets = fields["score_targets"].clamp(min=0)
        scores = ops.logprobs(
            logits=logits_of(model, hidden, adapters).float(), token_ids=targets, num_top=MAX_LOGPROBS
        )
    pooled = None
    if "pool_rows" in fields:
        pooled = pooled_sums(hidden, fields["pool_rows"], len(fields["seq_lens"]))
    return Passed(context.caches, logits, scores, pooled, () if extras is None else tuple(extras.tapped()))


def logits_of(
    model: StepModel, hidden: Tensor, adapters: StepAdapters | None = None, rows: Tensor | None = None
) -> Tensor:
    """[num_rows, vocab_size] of some rows of a step's hidden states, or of all, with the tokens' adapters of the head,
    where the model takes any."""
    if rows is not None:
        hidden = hidden[rows]
    if adapters is None or not takes_head_adapters(model):
        return model.logits(hidden)
    head: Any = model
    logits: Tensor = head.logits(hidden, adapters if rows is None else adapters.at(rows))
    return logits
