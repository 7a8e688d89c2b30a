"""Lists that meet: blocks that are a copy's source and another's destination, ids that stand twice, lists of nothing;
and what was exported or imported, when the pool has gone on. For pools of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from torch import Tensor

from anychip.plugin_api import CacheBackend, CanonicalArray
from anychip_conformance.attention_cases import rows
from anychip_conformance.case import Nothing, kind
from anychip_conformance.cases.test_steps import driven
from anychip_conformance.choices import CaseDtype
from anychip_conformance.device import Device
from anychip_conformance.equality import VOCAB_SIZE
from anychip_conformance.latent_calls import LatentCase
from anychip_conformance.latent_calls import backend_for as latent_backend
from anychip_conformance.paged import AttentionCase
from anychip_conformance.paged import backend_for as paged_backend
from anychip_conformance.state_calls import StateCase, StateRow
from anychip_conformance.state_calls import backend_for as state_backend
from anychip_conformance.step_driver import StepDriver, tokens_of

PoolKind = Literal["kv", "kv fp8", "kv int8", "latent", "state"]
_BLOCKS = 9
_ONE = rows((0, 3, 1))


class MovesCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`moves`: sources, and the destination of each."""

    pool: PoolKind
    moves: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    ids: tuple[int, ...] = ()
    dtype: CaseDtype = "any"


class Pool:
    """Every block holds numbers of its own, which a copy of it has too."""

    def __init__(self, device: Device, case: MovesCase) -> None:
        self.device = device
        backend, make = self._backend(device, case)
        self.backend: CacheBackend = backend
        self.cache: Any = make()
        self.everything = list(range(_BLOCKS))
        rng = np.random.default_rng(5)
        self.content = {
            array.name: device.tensor(rng.integers(1, 100, (_BLOCKS, *array.shape)), str(array.dtype))
            for array in self.arrays
        }
        self.put(self.everything, self.content)

    def _backend(self, device: Device, case: MovesCase) -> tuple[CacheBackend, Any]:
        def raw(page: int) -> Tensor:
            return device.platform.empty((_BLOCKS * page,), "uint8", "kv")

        self.arrays: Sequence[CanonicalArray]
        if case.pool == "state":
            state_case = StateCase(rows=(StateRow(1, 1),), dtype=case.dtype)
            states = state_backend(device, state_case)
            self.arrays = state_case.spec.canonical(1)
            return states, lambda: states.make_cache(raw(states.state_bytes()), _BLOCKS)
        if case.pool == "latent":
            latent_case = LatentCase(rows=_ONE, dtype=case.dtype)
            backend: Any = latent_backend(device, latent_case)
            spec: Any = latent_case.spec
        else:
            kv = case.pool.partition(" ")[2] or "same"
            dims = device.capabilities.head_dims
            head_dim = 16 if dims is None or 16 in dims else min(dims)
            paged_case = AttentionCase(rows=_ONE, dtype=case.dtype, kv=kv, head_dim=head_dim)  # type: ignore[arg-type]
            backend, spec = paged_backend(device, paged_case), paged_case.spec
        layout = backend.kv_layout()
        size = layout.block_sizes[0]
        self.arrays = spec.canonical(size)
        return backend, lambda: backend.make_cache(raw(layout.page_bytes(size)), _BLOCKS, size)

    def put(self, ids: Sequence[int], arrays: dict[str, Tensor]) -> None:
        self.cache = self.backend.import_arrays(self.cache, ids, arrays)

    def holds(self, what: str, expected: dict[str, Tensor]) -> None:
        found = self.backend.export_arrays(self.cache, self.everything)
        for name, values in found.items():
            self.device.same_bits(f"{what}: {name}", values.contiguous(), expected[name].contiguous())

    def picked(self, ids: Sequence[int]) -> dict[str, Tensor]:
        return {name: values[list(ids)].contiguous() for name, values in self.content.items()}


POOLS: tuple[PoolKind, ...] = get_args(PoolKind)
_MOVES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1, 2, 3), (2, 3, 4)),  # each destination is the next one's source
    ((4, 3, 2), (5, 4, 3)),
    ((2, 3, 4), (1, 2, 3)),
    ((1, 2), (2, 1)),
    ((1, 2, 3, 4, 5), (2, 3, 4, 5, 1)),
    ((1, 1, 1), (2, 5, 8)),
    ((3, 3, 5), (3, 4, 3)),
    ((), ()),
)


@kind(
    "kv.copies_that_meet",
    corpus=[
        MovesCase(pool=pool, moves=moves, dtype=dtype)  # type: ignore[arg-type]
        for pool in POOLS
        for moves in _MOVES
        for dtype in (("any", "narrow") if pool == "kv" else ("any",))
    ],
    quick=6,
)
def copies_that_meet(device: Device, case: MovesCase) -> None:
    """Sources are read as they were before the call: a block may be one copy's destination and another's source, and
    the source of several."""
    pool = Pool(device, case)
    sources, destinations = case.moves
    pool.cache = pool.backend.copy_blocks(pool.cache, list(sources), list(destinations))
    expected = {name: values.clone() for name, values in pool.content.items()}
    last = dict(zip(destinations, sources, strict=True))
    for destination, source in last.items():
        for name, values in expected.items():
            values[destination] = pool.content[name][source]
    pool.holds("blocks after the copies", expected)


_IDS = ((5, 2, 5, 5), (0, 8, 0), (), (1,), (3, 4, 5))


@kind("kv.repeated_ids", corpus=[MovesCase(pool=pool, ids=ids) for pool in POOLS for ids in _IDS], quick=5)
def repeated_ids(device: Device, case: MovesCase) -> None:
    """Ids that stand twice are exported twice and zeroed once; of no ids come arrays of no blocks."""
    pool, ids = Pool(device, case), list(case.ids)
    found, expected = pool.backend.export_arrays(pool.cache, ids), pool.picked(ids)
    for name, values in found.items():
        device.same_bits(f"exported {name}", values.contiguous(), expected[name])
    pool.cache = pool.backend.zero_blocks(pool.cache, ids)
    left = {name: values.clone() for name, values in pool.content.items()}
    for values in left.values():
        values[ids] = 0
    pool.holds("blocks after zeroing", left)


@kind("kv.exports_stay", corpus=[MovesCase(pool=pool, ids=ids) for pool in POOLS for ids in _IDS[3:]], quick=5)
def exports_stay(device: Device, case: MovesCase) -> None:
    """What was exported is a copy: blocks that are given to others, copied over and zeroed do not change it. What was
    imported is one too: the caller's arrays are its own again."""
    pool, ids = Pool(device, case), list(case.ids)
    found, expected = pool.backend.export_arrays(pool.cache, ids), pool.picked(ids)
    others = {name: values.flip(0).contiguous() for name, values in pool.content.items()}
    pool.put(pool.everything, others)
    pool.cache = pool.backend.copy_blocks(pool.cache, [6] * len(ids), ids)
    pool.cache = pool.backend.zero_blocks(pool.cache, pool.everything)
    for name, values in found.items():
        device.same_bits(f"exported {name}, read later", values.contiguous(), expected[name])
    pool.put(ids, found)
    for values in found.values():
        values.fill_(0)
    again = pool.backend.export_arrays(pool.cache, ids)
    for name, values in again.items():
        device.same_bits(f"imported {name}, whose source was overwritten", values.contiguous(), expected[name])


# -- through the step program -------------------------------------------------------------------------------------


@kind("step.copies_in_order", deadline_s=120.0)
def copies_in_order(device: Device, case: Nothing) -> None:
    """A step's copies come one after the other, whatever form the program gives its edit: through a chain, by a spare
    block around a ring, twice into one block, and before zeros of blocks that stand twice."""

    def check(driver: StepDriver) -> None:
        first, second = [17, 301, 44, 9, 260, 131], [401, 5, 77, 12, 300, 8]
        assert max(*first, *second) < VOCAB_SIZE
        new = {0: (first, [1]), 1: (second, [2])}
        started = tokens_of(driver.step(new=new, tokens={0: len(first), 1: len(second)}))
        wanted = tokens_of(driver.step(tokens={0: 1, 1: 1}))
        known = [[*text, token] for text, token in zip((first, second), started, strict=True)]

        def continued(blocks: list[int], *, copies: list[tuple[int, int]], zeros: list[int]) -> list[int]:
            """What both go on with, from blocks that the edit has left them."""
            taken = {slot: (ids, [block]) for slot, (ids, block) in enumerate(zip(known, blocks, strict=True), 2)}
            computed = {slot: len(ids) - 1 for slot, (ids, _) in taken.items()}
            result = driver.step(
                new=taken, computed=computed, tokens=dict.fromkeys(taken, 1), finished=leaving, copies=copies,
                zeros=zeros,
            )  # fmt: skip
            return tokens_of(result)

        leaving = [0, 1]
        # 1 to 4 by way of 3, and 2 over what 3 held.
        chain = continued([4, 3], copies=[(1, 3), (3, 4), (2, 3)], zeros=[1, 2, 1])
        leaving = [2, 3]
        # The two change places by way of a spare block.
        ring = continued([3, 4], copies=[(4, 6), (3, 4), (6, 3)], zeros=[6])
        # Two copies into one block, of which the last counts; then on from there.
        twice = continued([7, 8], copies=[(4, 7), (3, 7), (4, 8)], zeros=[3, 4, 3])
        for name, found in (("a chain", chain), ("a ring", ring), ("two into one block", twice)):
            assert found == wanted, f"{name}: got {found}, expected {wanted}"

    driven(device, check)
