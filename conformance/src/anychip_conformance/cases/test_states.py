"""State layers: every token advances its own sequence's state once, and blocks move as what they hold."""

from __future__ import annotations

import msgspec
import numpy as np

from anychip_conformance.case import kind
from anychip_conformance.choices import CaseDtype, each_dtype
from anychip_conformance.device import Device, seen
from anychip_conformance.oracle.rounding import rounded
from anychip_conformance.oracle.vectorised import Bounded
from anychip_conformance.state_calls import StateCall, StateCase, StateRow, backend_for, gated_sums, poisoned_everywhere

DECODE = (StateRow(5, 1), StateRow(1, 1), StateRow(40, 1))
MIXED = (StateRow(3, 7), StateRow(0, 33), StateRow(9, 1), StateRow(0, 1), StateRow(4, 2))
FRESH = (StateRow(0, 5), StateRow(0, 1), StateRow(0, 64))


@kind(
    "state.advance",
    corpus=[
        StateCase(rows=DECODE),
        StateCase(rows=MIXED),
        StateCase(rows=MIXED, pad_tokens=6, pad_rows=2),
        StateCase(rows=DECODE, pad_tokens=1, pad_rows=1, width=7),
        *each_dtype(StateCase(rows=MIXED, width=40, seed=1)),
        StateCase(rows=(StateRow(100, 300),), width=3),
    ],
)
def advance(device: Device, case: StateCase) -> None:
    """Every row's tokens advance its own state, from where it stood, once each. Padding advances nothing, and blocks of
    no row of the step keep their bits."""
    StateCall.make(device, case).check()


@kind("state.fresh", corpus=[StateCase(rows=FRESH), StateCase(rows=(StateRow(0, 1), StateRow(0, 1)), pad_rows=1)])
def fresh(device: Device, case: StateCase) -> None:
    """A sequence at its first token starts from zeros, whatever its block holds: the last state of another one."""
    call = StateCall.make(device, case)
    poisoned_everywhere(call)
    call.check()


class ChunkCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sequence's tokens in steps of so many."""

    chunks: tuple[int, ...]
    dtype: CaseDtype = "any"


@kind(
    "state.chunks",
    corpus=[ChunkCase(chunks=chunks) for chunks in ((40,), (1,) * 40, (7, 33), (16, 16, 8), (39, 1), (1, 39))],
)
def chunks(device: Device, case: ChunkCase) -> None:
    """However a sequence's tokens are spread over steps, outputs and the last state are the same up to rounding."""
    first = StateCase(rows=(StateRow(0, sum(case.chunks)),), dtype=case.dtype)
    whole = StateCall.make(device, first)
    x, gate, at = seen(whole.x), seen(whole.gate), 0
    expected = gated_sums(x, gate, np.zeros(first.width))
    running = whole
    for size in case.chunks:
        step = msgspec.structs.replace(first, rows=(StateRow(at, size),))
        call = StateCall.make(device, step)
        held = {"sum": running.held()[running.blocks]}
        call.cache = call.backend.import_arrays(call.cache, call.blocks, held)
        call.x, call.gate = whole.x[at : at + size], whole.gate[at : at + size]
        result, mine = call.run(), slice(at, at + size)
        bound = expected.bound[mine] + rounded(expected.value[mine], first.dtype)
        device.compare(f"tokens {at} to {at + size}", result, Bounded(expected.value[mine], bound))
        running, at = call, at + size
    last = Bounded(expected.value[-1], expected.bound[-1])
    device.compare("state of the last token", running.held()[running.blocks[0]], last)


STORED = [StateCase(rows=DECODE), StateCase(rows=DECODE, dtype="narrow", width=5)]


class _Pool:
    """A pool whose every block holds numbers of its own."""

    def __init__(self, device: Device, case: StateCase) -> None:
        self.device = device
        self.call = StateCall.make(device, case)
        shape = (self.call.num_blocks, case.width)
        self.content = device.held(np.random.default_rng(case.seed).integers(1, 100, shape), "float32")
        ids = list(range(self.call.num_blocks))
        self.call.cache = self.call.backend.import_arrays(self.call.cache, ids, {"sum": self.content})

    def holds(self, what: str) -> None:
        self.device.same_bits(what, self.call.held(), self.content)


@kind("state.layout", corpus=STORED)
def layout(device: Device, case: StateCase) -> None:
    """A sequence's block is no smaller than its arrays, and a pool of such blocks holds them all."""
    backend = backend_for(device, case)
    least = sum(array.nbytes for array in case.spec.canonical(1))
    assert backend.state_bytes() >= least, f"{backend.state_bytes()} bytes a block, whose arrays have {least}"
    _Pool(device, case).holds("blocks of a full pool")


@kind("state.shared_storage", corpus=STORED[:1])
def shared_storage(device: Device, case: StateCase) -> None:
    """The states lie in the memory that core gave, whose pool they share with those of no other layer."""
    backend, num_blocks = backend_for(device, case), 4
    raw = device.platform.empty((num_blocks * backend.state_bytes(),), "uint8", "kv")
    cache = backend.make_cache(raw.fill_(1), num_blocks)
    raw.zero_()
    held = backend.export_arrays(cache, range(num_blocks))["sum"]
    device.compare("states in cleared memory", held, Bounded(np.zeros(tuple(held.shape)), np.zeros(tuple(held.shape))))


@kind("state.export_import", corpus=STORED)
def export_import(device: Device, case: StateCase) -> None:
    """States leave and come back in canonical form, in the order of their ids; others stay."""
    pool = _Pool(device, case)
    call = pool.call
    moved = call.backend.export_arrays(call.cache, [5, 2, 4])
    assert moved.keys() == {"sum"}, f"exported arrays are {sorted(moved)}"
    device.same_bits("exported states", moved["sum"].contiguous(), pool.content[[5, 2, 4]].contiguous())
    call.cache = call.backend.import_arrays(call.cache, [1, 5, 3], {"sum": moved["sum"].clone()})
    pool.content[[1, 5, 3]] = pool.content[[5, 2, 4]].clone()
    pool.holds("states after the import")


@kind("state.copy_blocks", corpus=STORED)
def copy_blocks(device: Device, case: StateCase) -> None:
    """Destinations become their sources, and nothing else changes."""
    pool = _Pool(device, case)
    pool.call.cache = pool.call.backend.copy_blocks(pool.call.cache, [1, 4], [5, 2])
    pool.content[[5, 2]] = pool.content[[1, 4]].clone()
    pool.holds("states after the copy")


@kind("state.zero_blocks", corpus=STORED)
def zero_blocks(device: Device, case: StateCase) -> None:
    """Zeroed states hold zeros, and nothing else changes."""
    pool = _Pool(device, case)
    pool.call.cache = pool.call.backend.zero_blocks(pool.call.cache, [5, 0])
    pool.content[[5, 0]] = 0
    pool.holds("states after zeroing")
