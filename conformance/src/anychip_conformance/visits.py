"""How kinds are brought to the sizes of reach.REACH: a visit runs a kind's check with one dimension large, others
small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from anychip_conformance.case import Case, Kind
from anychip_conformance.choices import resolved, seeded
from anychip_conformance.form_checks import within
from anychip_conformance.reach import dimension
from anychip_conformance.verdicts import Refused

if TYPE_CHECKING:
    from anychip_conformance.device import Device


class VisitCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The visit of that name, at these sizes of a dimension, one after the other. `seed`: of other values."""

    visit: str
    dimension: str
    sizes: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True)
class Visit:
    """`params` makes a kind's parameters for a size. Sizes are the dimension's, from `least` to `most`, or `sizes`."""

    kind: Kind
    dimension: str
    params: Callable[[int], msgspec.Struct]
    least: int = 0
    most: int = 2**31
    sizes: tuple[int, ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        return self.kind.id + (f" {self.variant}" if self.variant else "")

    @property
    def case(self) -> VisitCase:
        known = dimension(self.dimension).sizes
        assert set(self.sizes) <= set(known), f"{self.name}: {self.sizes} are not all in the table"
        sizes = self.sizes or tuple(size for size in known if self.least <= size <= self.most)
        return VisitCase(visit=self.name, dimension=self.dimension, sizes=sizes)


@dataclass
class Visits:
    """The visits of one kind of cases."""

    visits: Sequence[Visit]
    _by_name: dict[tuple[str, str], Visit] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {(visit.name, visit.dimension): visit for visit in self.visits}
        assert len(self._by_name) == len(self.visits), "two visits have one name"

    @property
    def corpus(self) -> list[VisitCase]:
        return [visit.case for visit in self.visits]

    def check(self, device: Device, case: VisitCase) -> None:
        """Sizes that the device refuses are left out; raises Refused where it refuses all."""
        visit, passed = self._by_name[case.visit, case.dimension], 0
        refused = Refused("", "it has no size")
        for size in case.sizes:
            try:
                device.reaches(case.dimension, size)
                visit.kind.check(device, resolved(seeded(visit.params(size), case.seed), device))
                passed += 1
            except Refused as refusal:
                refused = refusal
            except Exception as error:
                raise within(error, f"{case.visit} at {case.dimension} = {size}") from error
        if not passed:
            raise refused


def visited(cases: Iterator[Case]) -> dict[str, set[int]]:
    """The sizes that cases visit, by dimension."""
    found: dict[str, set[int]] = {}
    for case in cases:
        if isinstance(case.params, VisitCase):
            found.setdefault(case.params.dimension, set()).update(case.params.sizes)
    return found
