"""Moves experts between ranks, so that every rank has about as much to do: looks at the load every so many steps, and
carries out what follows from it a little at a time, between steps.

All ranks take the same steps in the same order and see the same loads, so they decide alike without a word.
docs/decisions/0060 says why experts move, and what that costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anychip.config import EngineConfig
from anychip.layers.expert_slots import ExpertSlots
from anychip.layers.moe import SparseMoE, travelling_layers
from anychip.plugin_api import Communicator, StepModel
from anychip.step_messages import ExpertStats
from anychip.worker.expert_moves import EMPTY, Exchange, Move, aligned, exchanges
from anychip.worker.expert_packing import Places, balanced, imbalance

MOVES_A_STEP = 2
"""Slots that get another expert before one step: two that change places are two."""
_ALIGN = 16
"""Bytes: a tensor within others' bytes begins where any dtype may."""
_WORTH = 0.05
"""Of the mean load of a rank: what a layer's busiest rank must lose for experts to move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Underway:
    """Moves whose bytes travel while a step runs."""

    moves: Sequence[tuple[int, Move]]
    order: Sequence[tuple[int, int]]
    """(layer, slot) of this rank that bytes come for, in the order in which they arrive."""
    sizes: dict[int, int]
    """Bytes of an expert, by layer."""
    arrived: Callable[[], Tensor]


class ExpertBalancer:
    def __init__(self, layers: Sequence[SparseMoE], *, interval: int, num_hosts: int = 1) -> None:
        """Raises Unsupported for kernels whose experts cannot move."""
        first = layers[0]
        assert first.ep is not None
        self._layers = layers
        self._communicator: Communicator = first.ep.communicator
        self._interval, self._num_hosts = interval, num_hosts
        self._steps = 0
        self._moved = 0
        self._pending: deque[tuple[int, np.ndarray]] = deque()
        """Layers whose load was looked at, and it [num_experts]: their packing is still to be worked out."""
        self._moves: deque[tuple[int, Exchange]] = deque()
        self._underway: _Underway | None = None
        self._before: list[float] = []
        self._after: list[float] = []
        self._stats: ExpertStats | None = None
        for layer in layers:
            layer.kernel.expert_tensors(layer.packed, 0)
        self._forget()

    @classmethod
    def of(cls, model: StepModel, config: EngineConfig) -> ExpertBalancer | None:
        """None: none of a built model's experts may move."""
        layers = travelling_layers(model)
        if not layers or config.eplb_interval is None:
            return None
        return cls(layers, interval=config.eplb_interval, num_hosts=max(1, len(config.nodes)))

    def step(self) -> None:
        """Before each step: a little of what is to be done, and every `interval` steps a look."""
        self._steps += 1
        if self._underway is not None:
            self._take_in(self._underway)
        if self._pending:
            self._decide(*self._pending.popleft())
        elif self._moves:
            self._underway = self._sent(self._next_moves())
        elif self._steps % self._interval == 0:
            self._look()

    def news(self) -> ExpertStats | None:
        """What changed since it was last asked; None: nothing."""
        stats, self._stats = self._stats, None
        return stats

    # -- deciding -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Sums the ranks' counts; the next steps work out what follows, a layer each."""
        loads = torch.stack([_slots(layer).load[:-1] for layer in self._layers])
        total = self._communicator.all_reduce(loads).cpu().numpy()  # [num_layers, num_experts]
        self._forget()
        self._pending.extend(enumerate(total))
        self._before, self._after = [], []

    def _forget(self) -> None:
        for layer in self._layers:
            _slots(layer).load.zero_()

    def _decide(self, index: int, load: np.ndarray) -> None:
        layer, ranks = self._layers[index], self._communicator.size
        slots = _slots(layer)
        places = Places(
            num_ranks=ranks,
            slots_each=slots.each,
            num_groups=layer.spec.num_groups,
            num_hosts=self._num_hosts,
        )
        current = np.array(slots.experts)
        target = aligned(current, balanced(load.astype(float), places), ranks, self._hosts(layer))
        before, after = imbalance(current, load, ranks), imbalance(target, load, ranks)
        if before - after > _WORTH:
            self._moves.extend((index, exchange) for exchange in exchanges(current, target))
        self._before.append(before)
        self._after.append(min(before, after))
        if not self._pending:
            self._tell()

    def _hosts(self, layer: SparseMoE) -> int:
        """Hosts that groups of experts are bound to."""
        return 1 if layer.spec.num_groups % self._num_hosts else self._num_hosts

    def _tell(self) -> None:
        self._stats = ExpertStats(
            imbalance=float(np.mean(self._before)), planned=float(np.mean(self._after)), moved=self._moved
        )

    # -- moving -------------------------------------------------------------------------------------------

    def _next_moves(self) -> Sequence[tuple[int, Move]]:
        """Of the next exchanges as many as may happen at once: all read what their slots held before, so none may need
        what another of them writes."""
        chosen: list[tuple[int, Move]] = []
        written: set[tuple[int, int]] = set()
        while self._moves:
            index, exchange = self._moves[0]
            touched = {(index, slot) for move in exchange for slot in move}
            if chosen and (touched & written or len(chosen) + len(exchange) > MOVES_A_STEP):
                break
            self._moves.popleft()
            written |= {(index, move.to) for move in exchange}
            chosen += [(index, move) for move in exchange]
        return chosen

    def _sent(self, moves: Sequence[tuple[int, Move]]) -> _Underway:
        """Sends what moves, in one collective, and waits for nothing: the step goes on with the slots as they are."""
        rank, ranks = self._communicator.rank, range(self._communicator.size)
        leaving: list[list[Tensor]] = [[] for _ in ranks]  # by the rank that they go to
        coming: list[list[tuple[int, int]]] = [[] for _ in ranks]  # (layer, slot) by the rank that they come from
        for index, (to, source) in moves:
            each = _slots(self._layers[index]).each
            if source // each == rank:
                leaving[to // each].append(_bytes(self._tensors(index, source)))
            if to // each == rank:
                coming[source // each].append((index, to))
        sizes = {index: _num_bytes(self._tensors(index, 0)) for index, _ in moves}
        received = [sum(sizes[index] for index, _ in there) for there in coming]
        sent = [sum(map(len, parts)) for parts in leaving]
        device = self._tensors(moves[0][0], 0)[0].device
        flat = [part for parts in leaving for part in parts] or [torch.empty(0, dtype=torch.uint8, device=device)]
        arrived = self._communicator.begin_all_to_all_v(torch.cat(flat), sent, received)
        order = [place for there in coming for place in there]
        return _Underway(moves=moves, order=order, sizes=sizes, arrived=arrived)

    def _take_in(self, underway: _Underway) -> None:
        """A step later: what was sent is there, and routers are told of it."""
        moves, sizes, self._underway = underway.moves, underway.sizes, None
        pieces = torch.split(underway.arrived(), [sizes[index] for index, _ in underway.order])
        for (index, slot), data in zip(underway.order, pieces, strict=True):
            _fill(self._tensors(index, slot), data)
        for index in sizes:
            slots = _slots(self._layers[index])
            experts = list(slots.experts)
            for layer, move in moves:
                if layer == index:
                    assert slots.experts[move.source] != EMPTY
                    experts[move.to] = slots.experts[move.source]
            slots.assign(experts)
        self._moved += len(moves)
        self._tell()

    def _tensors(self, index: int, slot: int) -> Sequence[Tensor]:
        """Of a slot of this rank."""
        layer = self._layers[index]
        return layer.kernel.expert_tensors(layer.packed, slot % _slots(layer).each)

    @property
    def idle(self) -> bool:
        """Whether nothing is to be worked out or moved."""
        return not self._pending and not self._moves and self._underway is None


def _slots(layer: SparseMoE) -> ExpertSlots:
    assert layer.slots is not None
    return layer.slots


def _bytes(tensors: Sequence[Tensor]) -> Tensor:
    """[num_bytes] uint8: all of them, one behind the other, each filled up to a multiple of _ALIGN."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat([torch.nn.functional.pad(part, (0, -len(part) % _ALIGN)) for part in parts])


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors)


def _fill(tensors: Sequence[Tensor], data: Tensor) -> None:
    """The other way round."""
    start = 0
    for tensor in tensors:
        tensor.copy_(data[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += -(-tensor.nbytes // _ALIGN) * _ALIGN
