"""Which rank should hold which experts, by the load that each has: replicas for the busiest, then packing.

The policy is that of DeepSeek's EPLB ("DeepSeek-V3 Technical Report", 2024, section 3.4): groups of experts go to hosts
first, so that a token's experts are close together; then spare slots go to the experts with most load for a copy; then
copies go to ranks. It is plain numpy, and every rank that has the same loads gets the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SWAPS = 1
"""For each rank: exchanges that the refinement of a packing may make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """`num_ranks` ranks with `slots_each` slots for experts each, on `num_hosts` hosts. Experts are picked within
    groups of the router, `num_groups` of them. A copy of an expert lies once on a rank at most."""

    num_ranks: int
    slots_each: int
    num_groups: int = 1
    num_hosts: int = 1

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.slots_each


def balanced(loads: np.ndarray, places: Places) -> np.ndarray:
    """loads [num_experts] -> the expert of each slot [num_slots], slots in the order of ranks."""
    hosts = places.num_hosts
    if hosts == 1 or places.num_groups % hosts:
        return _packed(loads, places.num_ranks, places.slots_each).ravel()
    groups = np.arange(len(loads)).reshape(places.num_groups, -1)
    by_host = pack(loads[groups].sum(axis=1), np.ones(len(groups), int), hosts, len(groups) // hosts)
    parts = []
    for of_host in by_host:
        experts = groups[of_host].ravel()
        parts.append(experts[_packed(loads[experts], places.num_ranks // hosts, places.slots_each)].ravel())
    return np.concatenate(parts)


def _packed(loads: np.ndarray, num_ranks: int, slots_each: int) -> np.ndarray:
    copies = replicate(loads, num_ranks * slots_each, most=num_ranks)
    return pack(loads / copies, copies, num_ranks, slots_each)


def replicate(loads: np.ndarray, num_slots: int, *, most: int) -> np.ndarray:
    """How many copies each expert gets, [num_experts], at least one and at most `most`: every further slot goes to the
    expert with the greatest load for a copy. No other choice has a smaller greatest load for a copy."""
    copies = np.ones(len(loads), int)
    for _ in range(num_slots - len(loads)):
        each = np.where(copies < most, loads / copies, -1.0)
        copies[int(each.argmax())] += 1
    return copies


def pack(weights: np.ndarray, copies: np.ndarray, num_packs: int, size: int) -> np.ndarray:
    """Items with `copies` of each into packs of `size` that are alike in weight: the items of each pack
    [num_packs, size]. No pack gets an item twice. The heaviest go first, each into the lightest packs with room; then
    pairs are exchanged while that makes the heaviest pack lighter."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    totals, room = np.zeros(num_packs), np.full(num_packs, size)
    heaviest_first = np.argsort(-weights, kind="stable")
    left = int(copies.sum())
    # Items with copies first: single ones fit wherever room is left.
    order = sorted(heaviest_first.tolist(), key=lambda item: copies[item] == 1)
    pending = copies[order]
    for at, item in enumerate(order):
        chosen = _lightest(totals, room, int(copies[item]), pending[at + 1 :])
        for place in chosen:
            packs[place].append(item)
        totals[chosen] += weights[item]
        room[chosen] -= 1
        left -= len(chosen)
    assert left == 0 and not room.any(), "the copies fill the packs"
    found = np.array(packs)
    _refine(found, weights)
    return found


def _lightest(totals: np.ndarray, room: np.ndarray, count: int, pending: np.ndarray) -> np.ndarray:
    """The lightest `count` packs with room, as far as the copies that are pending still fit behind them. Single items,
    the last ones, always fit."""
    if count == 1:
        return np.array([int(np.where(room > 0, totals, np.inf).argmin())])
    open_packs = np.flatnonzero(room)
    light = open_packs[np.argsort(totals[open_packs], kind="stable")]
    roomy = open_packs[np.lexsort((totals[open_packs], -room[open_packs]))]
    for kept in range(count, -1, -1):
        first = light[:kept]
        chosen = np.concatenate([first, roomy[~np.isin(roomy, first)][: count - kept]])
        after = room.copy()
        after[chosen] -= 1
        if _fits(after, pending):
            return chosen
    raise AssertionError("the roomiest packs leave what fits")


def _fits(room: np.ndarray, pending: np.ndarray) -> bool:
    """Whether items with so many copies pending, once to a pack at most, fill the room exactly (Gale and Ryser)."""
    if len(pending) == 0 or pending.max() == 1:
        return int(room.sum()) == int(pending.sum())
    most = np.cumsum(-np.sort(-room))
    sizes = np.arange(1, len(room) + 1)
    taken = np.minimum(pending[None, :], sizes[:, None]).sum(axis=1)
    return bool((most <= taken).all()) and int(most[-1]) == int(pending.sum())


def _refine(packs: np.ndarray, weights: np.ndarray) -> None:
    """Exchanges items between the heaviest pack and another, while the heavier of the two gets lighter."""
    totals = weights[packs].sum(axis=1)
    holds = np.zeros((len(packs), len(weights)), bool)
    np.put_along_axis(holds, packs, True, axis=1)
    for _ in range(_SWAPS * len(packs)):
        heavy = int(totals.argmax())
        own = packs[heavy]
        given = weights[own][None, :, None] - weights[packs][:, None, :]  # [packs, own, theirs]: what `heavy` loses
        after = np.maximum(totals[heavy] - given, totals[:, None, None] + given)
        twice = holds[:, own][:, :, None] | holds[heavy][packs][:, None, :]  # the pack itself among them
        after[twice] = np.inf
        other, mine, theirs = (int(at) for at in np.unravel_index(int(after.argmin()), after.shape))
        if totals[heavy] - after[other, mine, theirs] <= 1e-12 * max(1.0, float(totals[heavy])):
            return
        leaves, comes = packs[heavy, mine], packs[other, theirs]
        packs[heavy, mine], packs[other, theirs] = comes, leaves
        holds[heavy, leaves] = holds[other, comes] = False
        holds[heavy, comes] = holds[other, leaves] = True
        totals[[heavy, other]] = weights[packs[[heavy, other]]].sum(axis=1)


def rank_loads(slots: np.ndarray, loads: np.ndarray, num_ranks: int) -> np.ndarray:
    """What each rank computes [num_ranks], if an expert's copies share its load evenly. slots [num_slots]: the expert
    of each, -1 where it is empty."""
    copies = np.bincount(slots[slots >= 0], minlength=len(loads))
    each = np.where(slots >= 0, (loads / np.maximum(copies, 1))[slots], 0.0)
    found: np.ndarray = each.reshape(num_ranks, -1).sum(axis=1)
    return found


def imbalance(slots: np.ndarray, loads: np.ndarray, num_ranks: int) -> float:
    """The busiest rank's load over the mean; 1 where nothing is loaded."""
    ranks = rank_loads(slots, loads, num_ranks)
    mean = float(ranks.mean())
    return float(ranks.max()) / mean if mean else 1.0
