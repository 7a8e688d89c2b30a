"""Slots of experts over the ranks: which expert lies in which, and what was routed to each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anychip.errors import ConfigError
from anychip.plugin_api import MeshShape, Placed, Platform, Routing, Sharded

EXPERTS, FEATURES = Sharded(dim=0, axis="ep"), Sharded(dim=1)
"""How experts' matrices [num_experts, intermediate_size, hidden_size] are divided."""


def expert_placement(shape: MeshShape) -> Placed:
    """Of experts' matrices. Ranks that have whole experts of their own share no features of them."""
    return (EXPERTS,) if shape.covers("ep", "tp") else (EXPERTS, FEATURES)


def check_experts(num_experts: int, shape: MeshShape, what: str) -> None:
    """Raises ConfigError where experts do not divide over the ranks."""
    size = shape.size_of("ep")
    if num_experts % size:
        would = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        raise ConfigError(f"{num_experts} {what} do not split evenly over {size} ranks; {would} would")


class ExpertSlots:
    """Every rank has as many slots as every other, and the first of them hold its experts when it is loaded; the others
    are empty until the load of the experts is known. `experts` is the expert of each slot, all ranks' slots in their
    order; -1 where it is empty. An expert lies once on a rank at most, but for steps in the midst of a move.

    `load` [num_experts + 1] counts how often each expert was picked by tokens that this rank routed since somebody set
    it to zero; the last one counts padded tokens.
    """

    def __init__(self, platform: Platform, *, num_experts: int, num_ranks: int, num_spare: int) -> None:
        """`num_spare` on each rank. Raises ConfigError for more than the ranks could use."""
        each = num_experts // num_ranks
        if each + num_spare > num_experts:
            raise ConfigError(
                f"{num_spare * num_ranks} redundant experts are {num_spare} on each of {num_ranks} ranks, beside "
                f"{each} of {num_experts} experts; {(num_experts - each) * num_ranks} or fewer have a use"
            )
        self.num_ranks, self.each = num_ranks, each + num_spare
        self._table = platform.empty((num_experts, num_ranks), "int64", "weights")
        self._copies = platform.empty((num_experts,), "int64", "weights")
        self.load = platform.empty((num_experts + 1,), "int64", "weights").zero_()
        firsts = range(0, num_experts, each)
        self.assign([slot for first in firsts for slot in (*range(first, first + each), *[-1] * num_spare)])

    def assign(self, experts: Sequence[int]) -> None:
        """From now on the slots hold these."""
        self.experts = list(experts)
        places: list[list[int]] = [[] for _ in range(len(self._copies))]
        for slot, expert in enumerate(experts):
            if expert >= 0:
                places[expert].append(slot)
        assert all(places), "an expert lies nowhere"
        used = [slots[: self.num_ranks] for slots in places]
        self._table.copy_(torch.tensor([(slots * self.num_ranks)[: self.num_ranks] for slots in used]))
        self._copies.copy_(torch.tensor([len(slots) for slots in used]))

    def pick(self, routing: Routing, routed: Tensor | None) -> Routing:
        """The routing with slots in place of experts; an expert's copies take turns by token. Padded tokens, False in
        routed [num_tokens], go nowhere: their slots are -1."""
        experts = routing.expert_ids.long()
        turn = torch.arange(len(experts), device=experts.device).unsqueeze(1) % self._copies[experts]
        slots = self._table[experts, turn]
        if routed is not None:
            padded = ~routed.unsqueeze(1)
            slots = slots.masked_fill(padded, -1)
            experts = experts.masked_fill(padded, len(self._copies))
        self.load += experts.flatten().bincount(minlength=len(self.load))
        return Routing(routing.weights, slots)
