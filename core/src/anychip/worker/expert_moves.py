"""How experts get from the slots where they lie to those where they should, a little at a time.

After every exchange each expert lies somewhere, so steps may run between any two of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

EMPTY = -1
"""In place of the expert of a slot that holds none."""


class Move(NamedTuple):
    """`to` gets the expert that slot `source` holds before the exchange."""

    to: int
    source: int


Exchange = tuple[Move, ...]
"""Happens at once: one slot is filled or written over, or two change places."""


def aligned(current: np.ndarray, target: np.ndarray, num_ranks: int, num_hosts: int = 1) -> np.ndarray:
    """The same packs of experts as `target` [num_slots], given to ranks and slots so that few experts move: ranks of a
    host take the packs that they hold most of, and an expert that stays keeps its slot."""
    now, wanted = current.reshape(num_ranks, -1), target.reshape(num_ranks, -1)
    each, most = num_ranks // num_hosts, int(target.max())
    found = np.empty_like(wanted)
    for first in range(0, num_ranks, each):
        here = slice(first, first + each)
        same = _members(now[here], most) @ _members(wanted[here], most).T  # [ranks, packs]
        for _ in range(each):
            rank, pack = np.unravel_index(int(same.argmax()), same.shape)
            found[first + rank] = _in_place(now[first + rank], wanted[first + pack])
            same[rank, :] = same[:, pack] = -1
    return found.ravel()


def _members(packs: np.ndarray, most: int) -> np.ndarray:
    """[num_packs, most + 1]: whether a pack holds an expert."""
    found = np.zeros((len(packs), most + 2), int)
    np.put_along_axis(found, packs, 1, axis=1)  # an empty slot counts at the end
    return found[:, :-1]


def _in_place(now: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    stays = np.isin(now, wanted)
    result = np.where(stays, now, EMPTY)
    result[~stays] = wanted[~np.isin(wanted, now)]
    return result


def exchanges(current: np.ndarray, target: np.ndarray) -> Iterator[Exchange]:
    """What turns `current` into `target`, both [num_slots] the expert of each slot. An exchange puts one slot right at
    least, and no slot that is right is written again."""
    held = current.tolist()
    wanted = target.tolist()
    copies = Counter(held)
    for slot in range(len(held)):
        while held[slot] != wanted[slot]:
            exchange = _next(slot, held, wanted, copies)
            before = list(held)
            for to, source in exchange:
                copies[held[to]] -= 1
                copies[before[source]] += 1
                held[to] = before[source]
            yield exchange


def _next(slot: int, held: list[int], wanted: list[int], copies: Counter[int]) -> Exchange:
    def spare(at: int) -> bool:
        return held[at] == EMPTY or copies[held[at]] > 1

    if spare(slot):
        return (Move(slot, held.index(wanted[slot])),)
    expert = held[slot]
    place = next(at for at, want in enumerate(wanted) if want == expert and held[at] != expert)
    if spare(place):
        return (Move(place, slot),)
    return Move(slot, place), Move(place, slot)
