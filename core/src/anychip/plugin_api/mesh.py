"""Ranks as a mesh: named axes, and for each axis that somebody asks for a communicator along it.

An axis is a way to share work: "tp" splits a layer's matrices, "pp" the layers, "dp" the requests, "cp" a sequence's
keys, "ep" the experts. Ranks are counted like the digits of a number, in the order of AXES, the last axis fastest: of
a mesh with dp 2 and tp 2, ranks 0, 1, 2, 3 lie at (dp, tp) = (0, 0), (0, 1), (1, 0), (1, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal, get_args

from anychip.errors import Unsupported
from anychip.plugin_api.communicator import Communicator, GroupSpec

Axis = Literal["pp", "dp", "cp", "ep", "tp"]
AXES: tuple[Axis, ...] = get_args(Axis)
"""Every axis there is, the slowest first: the ranks of one tp group are neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """How many ranks lie along each axis. `joined` makes an axis of others: {"ep": ("dp", "tp")} spreads experts over
    the ranks of every dp group and its tp groups; the axis itself keeps size 1. Raises Unsupported for what is no mesh.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1
    joined: Mapping[Axis, tuple[Axis, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        reasons = [f"axis {axis} has size {getattr(self, axis)}" for axis in AXES if getattr(self, axis) < 1]
        for name, parts in self.joined.items():
            for axis in (name, *parts):
                _known(axis)
            if getattr(self, name) != 1:
                reasons.append(f"axis {name} is joined from {', '.join(parts)} and has a size of its own")
            if not parts or len({*parts}) < len(parts) or any(part in self.joined for part in parts):
                reasons.append(f"axis {name} joins {', '.join(parts) or 'none'}; expected different axes, none joined")
        if reasons:
            raise Unsupported("mesh", reasons)

    def __str__(self) -> str:
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "one rank"

    @property
    def size(self) -> int:
        return prod(getattr(self, axis) for axis in AXES)

    def size_of(self, axis: Axis) -> int:
        """Ranks along an axis. Raises Unsupported for one that does not exist."""
        return prod(getattr(self, part) for part in self._parts(axis))

    def covers(self, axis: Axis, other: Axis) -> bool:
        """Whether what lies along `other` lies along `axis` already: {"ep": ("dp", "tp")} covers tp."""
        return axis == other or other in self.joined.get(axis, ())

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """Where a rank of the world lies, by axis."""
        return {axis: rank // stride % getattr(self, axis) for axis, stride in self._strides().items()}

    def place(self, axis: Axis, rank: int) -> int:
        """A rank's place among its peers along an axis."""
        return self.peers(axis, rank).index(rank)

    def peers(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """World ranks that differ from `rank` along an axis alone, `rank` included, in the order of their coordinates;
        along a joined axis in the order of AXES, however it names its parts."""
        strides, own = self._strides(), self.coordinates(rank)
        moving = [part for part in AXES if part in self._parts(axis)]
        found = [rank - sum(own[part] * strides[part] for part in moving)]
        for part in moving:
            found = [first + step * strides[part] for first in found for step in range(getattr(self, part))]
        return tuple(found)

    def _strides(self) -> dict[Axis, int]:
        """By axis, how far apart neighbours along it are in the world."""
        sizes = [getattr(self, axis) for axis in AXES]
        return {axis: prod(sizes[place + 1 :]) for place, axis in enumerate(AXES)}

    def _parts(self, axis: Axis) -> tuple[Axis, ...]:
        return self.joined.get(_known(axis), (axis,))


def _known(axis: Axis) -> Axis:
    if axis not in AXES:
        raise Unsupported("mesh", [f"there is no axis {axis!r}; axes are {', '.join(AXES)}"])
    return axis


class Mesh:
    """The mesh as one of its ranks sees it. `communicator` is Platform.communicator, or what stands for it: it is
    asked once for each axis that is asked for and has several ranks, with the axis as the group's purpose. Opening a
    group needs all of its ranks, so they ask for the same axes in the same order.
    """

    def __init__(
        self,
        shape: MeshShape,
        rank: int,
        communicator: Callable[[GroupSpec], Communicator],
        *,
        max_message_bytes: int = 0,
        store: str = "",
        timeout_s: float = 0.0,
    ) -> None:
        self.shape = shape
        self.rank = rank
        self._communicator = communicator
        self._max_message_bytes = max_message_bytes
        self._store, self._timeout_s = store, timeout_s
        self._opened: dict[Axis, Communicator] = {}

    @classmethod
    def alone(cls) -> Mesh:
        """One rank, which needs no platform's communicator."""
        return cls(MeshShape(), 0, Communicator)

    def axis(self, name: Axis) -> Communicator:
        """The communicator along an axis: its `rank` is this rank's coordinate, its `size` the axis's. Of an axis of
        one rank it is the base class, which costs nothing. Raises Unsupported for an axis that does not exist, and
        with the platform's reasons for one that it refuses."""
        found = self._opened.get(name)
        if found is None:
            found = self._opened[name] = self._open(name)
        return found

    @property
    def opened(self) -> tuple[Communicator, ...]:
        """What was asked for so far: a capture must know them."""
        return tuple(self._opened.values())

    def _open(self, name: Axis) -> Communicator:
        group = GroupSpec(
            ranks=self.shape.peers(name, self.rank),
            rank=self.rank,
            purpose=name,
            max_message_bytes=self._max_message_bytes,
            store=self._store,
            timeout_s=self._timeout_s,
        )
        if group.size == 1:
            return Communicator(group)
        try:
            return self._communicator(group)
        except Unsupported as refusal:
            reasons = [f"axis {name} of {group.size} ranks: {reason}" for reason in refusal.reasons]
            raise Unsupported(refusal.who, reasons) from refusal
