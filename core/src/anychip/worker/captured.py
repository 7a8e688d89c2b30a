"""What a program has captured, at the start or when a step first needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class CapturedDraw:
    handle: object
    plans: list[object]


@dataclass(slots=True)
class CapturedStep:
    handle: object
    staged: Tensor
    fields: Mapping[str, Tensor]  # views of `staged`, as the next are
    draws: Mapping[bool, Mapping[str, Tensor]]  # by whether the step has drafts
    plans: list[object]
    taps: Sequence[Tensor]  # of `handle`'s output, which replays rewrite
    draw_graphs: dict[tuple[tuple[str, ...], bool], CapturedDraw | None] = field(default_factory=dict)
    """By the sampling's features and whether all is greedy; None where the platform could not."""


@dataclass(slots=True)
class CapturedPieces:
    handle: object
    ids: Tensor  # [num_tokens]
    positions: Tensor
    tap_tokens: Tensor | None  # [num_tokens]
    taps: Sequence[Tensor]


class Captured(Generic[K, V]):
    """`made` has what was captured so far, by shape; None where the platform could not."""

    def __init__(self, make: Callable[[K], V | None]) -> None:
        self.made: dict[K, V | None] = {}
        self._make = make
        self._later: set[K] = set()

    def __len__(self) -> int:
        return sum(each is not None for each in self.made.values())

    def now(self, keys: Iterable[K]) -> None:
        for key in keys:
            if key not in self.made:
                self.made[key] = self._make(key)

    def later(self, keys: Iterable[K]) -> None:
        """These are captured when `get` first asks for them."""
        self._later.update(keys)

    def get(self, key: K) -> V | None:
        """None: the shape is run eagerly."""
        if key in self._later:
            self.now([key])
        return self.made.get(key)
