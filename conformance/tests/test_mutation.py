"""Every planted fault is killed by the case that it names; without a fault, and with a harmless change, that case
passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pytest

from anychip_conformance.case import Case
from anychip_conformance.device import Device, open_device
from anychip_conformance.faulty.registry import all_faults, placebos
from anychip_conformance.registry import all_cases, find_case
from anychip_conformance.run import run_case
from anychip_conformance.verdicts import Outcome, Verdict

MUST_HAVE = 400
T = TypeVar("T")
BUDGET = 120
"""So many faults are planted by `make test`, however many there are; `make mutation` plants all."""


def in_turn(groups: Iterable[Sequence[T]]) -> list[T]:
    """The first of every group, then the second of every one that has two, and so on."""
    return [each for nth in itertools.zip_longest(*groups) for each in nth if each is not None]


def sample(faults: dict[str, str], budget: int) -> set[str]:
    """Of faults and the cases that kill them, `budget` many: one of each kind of case, and then another of each, where
    sections take turns with their kinds."""
    sections: dict[str, dict[str, list[str]]] = {}
    for id, killed_by in faults.items():
        kind = killed_by.rpartition(".")[0]
        sections.setdefault(id.partition("-")[0], {}).setdefault(kind, []).append(id)
    return set(in_turn(in_turn(list(kinds.values()) for kinds in sections.values()))[:budget])


def parameters() -> list[Any]:
    faults = {id: fault.killed_by for id, fault in all_faults().items()}
    chosen = sample(faults, BUDGET)
    return [pytest.param(id, marks=[] if id in chosen else [pytest.mark.full]) for id in faults]


class Honest:
    """The faulty platforms without a fault. Each is opened once, and judged once by each case."""

    def __init__(self) -> None:
        self._opened: dict[str, Device] = {}
        self._outcomes: dict[tuple[str, str], Outcome] = {}

    def outcome(self, device: str, case: Case) -> Outcome:
        if device not in self._opened:
            self._opened[device] = open_device(device, {})
        if (device, case.id) not in self._outcomes:
            self._outcomes[device, case.id] = run_case(self._opened[device], case)
        return self._outcomes[device, case.id]

    def close(self) -> None:
        for device in self._opened.values():
            device.close()


@pytest.fixture(scope="module")
def honest() -> Iterator[Honest]:
    platforms = Honest()
    yield platforms
    platforms.close()


def test_there_are_enough_faults() -> None:
    assert len(all_faults()) >= MUST_HAVE
    assert all(find_case(fault.killed_by) is not None for fault in all_faults().values())


def test_the_sample_has_some_of_every_section_and_of_its_kinds() -> None:
    faults = {f"a-{n}": f"a.x.{n:03}" for n in range(9)} | {"a-z": "a.y.001", "b-1": "b.x.001"}
    assert [sample(faults, budget) for budget in (1, 2, 3)] == [{"a-0"}, {"a-0", "b-1"}, {"a-0", "b-1", "a-z"}]
    chosen = sample({id: fault.killed_by for id, fault in all_faults().items()}, BUDGET)
    assert {id.partition("-")[0] for id in chosen} == {id.partition("-")[0] for id in all_faults()}
    assert len(chosen) == BUDGET


@pytest.mark.parametrize("id", parameters())
def test_the_fault_is_killed(id: str, honest: Honest) -> None:
    fault = all_faults()[id]
    case = find_case(fault.killed_by)
    assert case is not None
    device = open_device(fault.device, {"fault": id})
    try:
        outcome = run_case(device, case)
    finally:
        device.close()
    assert outcome.verdict is Verdict.FAIL, f"{id} ({fault.summary}) survives {case.id}: {outcome.verdict}"
    sound = honest.outcome(fault.device, case)
    assert sound.verdict is Verdict.PASS, f"{case.id} fails without a fault: {sound.message}"


@pytest.mark.parametrize("id", placebos())
def test_a_placebo_survives(id: str) -> None:
    """Whole sections, not one case."""
    sections = ("latent.",) if placebos()[id].part == "latent" else ("attn.", "kv.", "graph.")
    device = open_device("fake-faulty", {"fault": id})
    try:
        for case in all_cases():
            if case.id.startswith(sections):
                outcome = run_case(device, case)
                assert outcome.verdict in (Verdict.PASS, Verdict.NOT_SUPPORTED), f"{case.id}: {outcome.message}"
    finally:
        device.close()
