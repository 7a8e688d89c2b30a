"""Every recurrence: both of its forms, any chunking, forks, and what padding must leave alone."""

from __future__ import annotations

import msgspec

from anychip.plugin_api import RECURRENCES
from anychip_conformance.case import kind
from anychip_conformance.choices import CaseDtype
from anychip_conformance.device import Device, seen
from anychip_conformance.recurrence_calls import RecurrenceCall, RecurrenceCase
from anychip_conformance.state_calls import StateRow

DECODE = (StateRow(5, 1), StateRow(1, 1), StateRow(40, 1))
MIXED = (StateRow(3, 7), StateRow(0, 33), StateRow(9, 1), StateRow(0, 1), StateRow(4, 2))
LONG = (StateRow(100, 150),)


@kind(
    "state.recurrence",
    corpus=[
        case
        for name in RECURRENCES
        for case in (
            RecurrenceCase(recurrence=name, rows=DECODE),
            RecurrenceCase(recurrence=name, rows=MIXED, pad_tokens=6, pad_rows=2, seed=1),
            RecurrenceCase(recurrence=name, rows=MIXED, dtype="narrow", seed=2),
            RecurrenceCase(recurrence=name, rows=LONG, seed=3),
        )
    ],
)
def recurrence(device: Device, case: RecurrenceCase) -> None:
    """Every row's tokens advance its own state as the recurrence says, from where it stood, once each. Padding advances
    nothing, and blocks of no row of the step keep their bits."""
    RecurrenceCall.make(device, case).check()


@kind(
    "state.recurrence_fresh",
    corpus=[RecurrenceCase(recurrence=name, rows=(StateRow(0, 5), StateRow(0, 1)), pad_rows=1) for name in RECURRENCES],
)
def recurrence_fresh(device: Device, case: RecurrenceCase) -> None:
    """A sequence at its first token starts from zeros, whatever its block holds: the last state of another one."""
    call = RecurrenceCall.make(device, case)
    everything = list(range(call.num_blocks))
    call.put(everything, call.held().fill_(device.poison))
    call.check()


class CutCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sequence's tokens in steps of so many."""

    recurrence: str
    chunks: tuple[int, ...]
    dtype: CaseDtype = "any"


@kind(
    "state.recurrence_chunks",
    corpus=[
        CutCase(recurrence=name, chunks=chunks)
        for name in RECURRENCES
        for chunks in ((1,) * 20, (7, 2, 1, 90), (65, 1, 34), (2, 64, 3))
    ],
)
def recurrence_chunks(device: Device, case: CutCase) -> None:
    """However a sequence's tokens are spread over steps, outputs and the last state are the same up to rounding."""
    first = RecurrenceCase(recurrence=case.recurrence, rows=(StateRow(0, sum(case.chunks)),), dtype=case.dtype)
    whole = RecurrenceCall.make(device, first)
    outputs, last = whole.expected(slice(None), whole.states[0])
    at, state = 0, whole.held()[:1]
    for size in case.chunks:
        step = RecurrenceCall.make(device, msgspec.structs.replace(first, rows=(StateRow(at, size),)))
        step.layer = whole.layer
        step.put(step.blocks, state)
        mine = slice(at, at + size)
        step.inputs = {name: given[mine] for name, given in whole.inputs.items()}
        result = step.run()
        device.compare(f"tokens {at} to {at + size}", result, type(outputs)(outputs.value[mine], outputs.bound[mine]))
        state, at = step.held()[step.blocks], at + size
    device.compare("state of the last token", state[0], last)


@kind("state.fork", corpus=[RecurrenceCase(recurrence=name, rows=(StateRow(9, 3),)) for name in RECURRENCES])
def fork(device: Device, case: RecurrenceCase) -> None:
    """A copied block is a state of its own: what its sequence takes in is not in the one that it was copied from, and
    the other way round."""
    call = RecurrenceCall.make(device, case)
    (source,), copy = call.blocks, next(block for block in range(1, call.num_blocks) if block not in call.blocks)
    before = seen(call.held()[source])
    call.cache = call.backend.copy_blocks(call.cache, [source], [copy])
    call.check()  # the copy is no row of the step: it keeps its bits
    child = RecurrenceCall.make(device, msgspec.structs.replace(case, seed=7))
    child.layer, child.cache, child.blocks = call.layer, call.cache, [copy]
    child.view.state_blocks[0], child.states = copy, [before]
    child.check()
