"""Adapters by the reference: the grouped low-rank update, and the stacks that hold what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anychip.plugin_api.adapters import AdaptedPart, AdapterEntry, AdapterSite, AdapterStack, LowRank


def add_low_rank(*, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
    """plugin_api.Ops.add_low_rank: every slot is applied to all tokens, and those that have it keep the result. So its
    shapes follow from its arguments', it reads no value on the host, and no slot's values reach another's tokens."""
    wide = x.float()
    for slot in range(len(stack.down)):
        changes = []
        for part, (begin, end) in enumerate(zip(stack.offsets, stack.offsets[1:], strict=False)):
            inner = wide @ stack.down[slot, part].float().T  # [num_tokens, max_rank]
            change = inner @ stack.up[slot, :, begin:end].float()
            changes.append(change * stack.scales[slot, part])
        total = (y.float() + torch.cat(changes, dim=-1)).to(y.dtype)
        y = torch.where((slots == slot).unsqueeze(-1), total, y)
    return y


def blank_stacks(
    sites: Sequence[AdapterSite], max_adapters: int, max_rank: int, empty: Callable[[Sequence[int], str], Tensor]
) -> list[AdapterStack]:
    """Stacks of empty slots, by site. `empty(shape, dtype)` makes a tensor where the program keeps its state."""
    stacks = []
    for site in sites:
        shapes = site.shapes(max_adapters, max_rank)
        tensors = {name: empty(shape, dtype).zero_() for name, (shape, dtype) in shapes.items()}
        if "gains" in tensors:
            tensors["gains"].fill_(1.0)
        stacks.append(AdapterStack(offsets=site.offsets, **tensors))
    return stacks


def write_adapters(
    stacks: Sequence[AdapterStack], sites: Sequence[AdapterSite], entries: Sequence[AdapterEntry]
) -> None:
    """StepProgram.adapt in place: each entry's slot holds its modules from now on, as far as the sites' rank has them,
    and nothing of what it held. No device must write by index."""
    for entry in entries:
        for site, stack in zip(sites, stacks, strict=True):
            for place, modules in enumerate(site.modules, start=entry.slot * len(site.modules)):
                for index, (part, name) in enumerate(zip(site.parts, modules, strict=True)):
                    _write(stack, site, part, index, place, entry.modules.get(name))


def _write(
    stack: AdapterStack, site: AdapterSite, part: AdaptedPart, index: int, place: int, module: LowRank | None
) -> None:
    own = slice(part.offset, part.offset + part.held.count)
    down, up = stack.down[place, index], stack.up[place, :, own]
    rank = 0 if module is None else module.rank
    first, last = part.held.bounds
    if module is not None:
        up[:rank].copy_(module.up[first:last].T)
        if stack.table is None:
            down[:rank].copy_(module.down[:, slice(*site.columns.bounds)])
        else:
            down[:rank].copy_(torch.eye(rank, down.shape[1]))
    down[rank:].zero_()
    up[rank:].zero_()
    stack.scales[place, index].fill_(0.0 if module is None else module.scale)
    stack.ranks[place, index].fill_(rank)
    if stack.table is not None:
        rows = stack.table[place * site.in_features : (place + 1) * site.in_features]
        if module is not None:
            rows[:, :rank].copy_(module.down.T)
        rows[:, rank:].zero_()
    for held, given, plain in (
        (stack.gains, None if module is None else module.gain, 1.0),
        (stack.shifts, None if module is None else module.shift, 0.0),
    ):
        if held is not None and given is not None:
            held[place, own].copy_(given[first:last])
        elif held is not None:
            held[place, own].fill_(plain)
