"""Every planted fault is killed by the case that it names; without a fault, and with a harmless change, that case
passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from anychip_conformance.case import Case
from anychip_conformance.device import Device, open_device
from anychip_conformance.faulty.registry import all_faults, placebos
from anychip_conformance.registry import all_cases, find_case
from anychip_conformance.run import run_case
from anychip_conformance.verdicts import Outcome, Verdict

MUST_HAVE = 400
SAMPLE = 4
"""One fault in so many, of every section, is planted by `make test`; `make mutation` plants all."""


def sampled() -> list[Any]:
    seen: Counter[str] = Counter()
    parameters = []
    for id in all_faults():
        section = id.partition("-")[0]
        marks = [pytest.mark.full] if seen[section] % SAMPLE else []
        parameters.append(pytest.param(id, marks=marks))
        seen[section] += 1
    return parameters


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


@pytest.mark.parametrize("id", sampled())
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
