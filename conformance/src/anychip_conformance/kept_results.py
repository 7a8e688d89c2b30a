"""What a call gave, looked at later; and calls that come back after others, of one object."""

from __future__ import annotations

from torch import Tensor

from anychip_conformance.device import Device
from anychip_conformance.row_calls import Given, Maker

LATER_CALLS = 3
MANY_CALLS = 70
"""Of one object: past what counts to 64."""


def copies(found: Given) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in found.items()}


def others(given: Given) -> dict[str, Tensor]:
    """Other numbers of the same shapes."""
    return {name: (values * -0.5).contiguous() for name, values in given.items()}


def same(device: Device, when: str, found: Given, expected: Given) -> None:
    for name, values in found.items():
        device.same_bits(f"{name} {when}", values.contiguous(), expected[name].contiguous())


def check_kept(device: Device, make: Maker) -> None:
    """A result is read after its inputs were overwritten and the object was called again: it is what a call whose
    result was read at once gives."""
    fresh, call = make(), make()
    expected = copies(fresh.run(fresh.inputs))
    given, later = copies(call.inputs), others(call.inputs)
    found = call.run(given)
    if call.kept:
        for values in given.values():
            values.fill_(7)
    for _ in range(LATER_CALLS):
        call.run(copies(later))
    same(device, "read after its inputs were overwritten, and after later calls", found, expected)


def check_many(device: Device, make: Maker, calls: int = MANY_CALLS) -> None:
    """Two calls in turns, many times over, of one object: each gives what an object of its own gives."""
    call = make()
    turns = (copies(call.inputs), others(call.inputs))
    alone = [make() for _ in turns]  # kept, so that none of their storage comes back
    wanted = [copies(each.run(copies(given))) for each, given in zip(alone, turns, strict=True)]
    for number in range(calls):
        found = call.run(copies(turns[number % 2]))
        same(device, f"of call {number + 1}", found, wanted[number % 2])
