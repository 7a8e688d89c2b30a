"""What adapters do behind a product, and to an embedding: the grouped low-rank update, and DoRA's gains."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.plugin_api import AdapterSite, AdapterStack, Ops, StepAdapters


def adapted(ops: Ops, site: AdapterSite | None, x: Tensor, y: Tensor, adapters: StepAdapters | None) -> Tensor:
    """y [num_tokens, out_features], the site's product of x, with the adapters of the step's tokens."""
    if adapters is None or site is None:
        return y
    stack = adapters.stacks[site.index]
    return gained(ops.add_low_rank(x=x, y=y, stack=stack, slots=adapters.slots), stack, adapters.slots)


def gained(y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """With DoRA's gains, where the stack has room for any: they multiply what is no bias."""
    if stack.gains is None:
        return y
    places = torch.where(slots < 0, len(stack.gains) - 1, slots).long()  # the last place changes nothing
    wide = y.float() * stack.gains[places]
    return (wide if stack.shifts is None else wide + stack.shifts[places]).to(y.dtype)


def embedded(ops: Ops, site: AdapterSite | None, ids: Tensor, hidden: Tensor, adapters: StepAdapters | None) -> Tensor:
    """hidden [num_tokens, hidden_size], the rows of ids in an embedding, with the adapters of the step's tokens. A
    token's column of A is looked up; what is left is a product."""
    if adapters is None or site is None:
        return hidden
    stack = adapters.stacks[site.index]
    assert stack.table is not None, "the site is an embedding's"
    columns = ops.embedding(ids=adapters.slots.clamp(min=0) * site.in_features + ids, weight=stack.table)
    return adapted(ops, site, columns, hidden, adapters)
