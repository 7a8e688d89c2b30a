"""Kinds of cases. A kind is one check; its cases are the frozen parameters it always runs with (tier A), and one that
draws as many more (tier B).

Example:
    @kind("op.softcap", corpus=[SoftcapCase(...)], drawn=strategy)
    def softcap(device: Device, case: SoftcapCase) -> None:
        "tanh saturates at the cap, in the input's dtype."
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Profile = Literal["core", "distributed", "graph", "quantization", "deterministic"]
PROFILES: tuple[Profile, ...] = ("core", "distributed", "graph", "quantization", "deterministic")
DRAWN = "drawn"
"""Last part of the id of a tier B case."""

C = TypeVar("C", bound=msgspec.Struct)


class Nothing(msgspec.Struct, frozen=True):
    """Parameters of a check that has none."""


@dataclass(frozen=True)
class Kind:
    """`quick` says how many of the corpus the quick profile runs; `examples` how many are drawn. `deadline_s` excludes
    the device's compilation, for which --deadline-scale makes room. `needs_device` False: it runs
    where the device is not."""

    id: str
    check: Callable[[Any, Any], None]
    profile: Profile
    corpus: tuple[msgspec.Struct, ...]
    drawn: SearchStrategy[Any] | None
    examples: int
    quick: int
    deadline_s: float
    needs_device: bool

    @property
    def protects(self) -> str:
        """What the check protects from: the first paragraph of its docstring."""
        return " ".join((self.check.__doc__ or "").strip().split("\n\n")[0].split())

    @property
    def params(self) -> type[msgspec.Struct]:
        return type(self.corpus[0])

    def cases(self) -> Iterator[Case]:
        for index, params in enumerate(self.corpus):
            yield Case(self, f"{index + 1:03}", params)
        if self.drawn is not None:
            yield Case(self, DRAWN, None)


@dataclass(frozen=True)
class Case:
    """One row of the manifest. `params` None: drawn."""

    kind: Kind
    suffix: str
    params: msgspec.Struct | None = field(compare=False)

    @property
    def id(self) -> str:
        return f"{self.kind.id}.{self.suffix}"

    @property
    def quick(self) -> bool:
        """Whether the quick profile runs it."""
        return self.params is not None and int(self.suffix) <= self.kind.quick


def kind(
    id: str,
    *,
    corpus: Sequence[C] = (),
    drawn: SearchStrategy[C] | None = None,
    profile: Profile = "core",
    examples: int = 40,
    quick: int = 3,
    deadline_s: float = 60.0,
    needs_device: bool = True,
) -> Callable[[Callable[[Any, C], None]], Kind]:
    """Makes a check a kind. Without a corpus the check has no parameters and is one case."""

    def made(check: Callable[[Any, C], None]) -> Kind:
        assert check.__doc__, f"{id}: say what it protects from"
        return Kind(
            id=id,
            check=check,
            profile=profile,
            corpus=tuple(corpus) or (Nothing(),),
            drawn=drawn,
            examples=examples,
            quick=quick,
            deadline_s=deadline_s,
            needs_device=needs_device,
        )

    return made
