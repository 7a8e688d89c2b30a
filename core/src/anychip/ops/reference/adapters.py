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

    def zeros(shape: Sequence[int], dtype: str) -> Tensor:
        return empty(shape, dtype).zero_()

    return [
        AdapterStack(
            down=zeros((max_adapters, len(site.parts), max_rank, site.columns.count), site.dtype),
            up=zeros((max_adapters, max_rank, site.out_features), site.dtype),
            scales=zeros((max_adapters, len(site.parts)), "float32"),
            ranks=zeros((max_adapters, len(site.parts)), "int32"),
            offsets=site.offsets,
        )
        for site in sites
    ]


def write_adapters(
    stacks: Sequence[AdapterStack], sites: Sequence[AdapterSite], entries: Sequence[AdapterEntry]
) -> None:
    """StepProgram.adapt in place: each entry's slot holds its modules from now on, as far as the sites' rank has them,
    and nothing of what it held. No device must write by index."""
    for entry in entries:
        for site, stack in zip(sites, stacks, strict=True):
            for part_index, part in enumerate(site.parts):
                _write(stack, site, part, part_index, entry.slot, entry.modules.get(part.module))


def _write(
    stack: AdapterStack, site: AdapterSite, part: AdaptedPart, index: int, slot: int, module: LowRank | None
) -> None:
    down, up = stack.down[slot, index], stack.up[slot, :, part.offset : part.offset + part.held.count]
    rank = 0 if module is None else module.rank
    if module is not None:
        left, right = site.columns.bounds
        first, last = part.held.bounds
        down[:rank].copy_(module.down[:, left:right])
        up[:rank].copy_(module.up[first:last].T)
    down[rank:].zero_()
    up[rank:].zero_()
    stack.scales[slot, index].fill_(0.0 if module is None else module.scale)
    stack.ranks[slot, index].fill_(rank)
