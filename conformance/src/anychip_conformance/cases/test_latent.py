"""Latent attention: one row per token that all heads share, written at its slot, and attended to."""

from __future__ import annotations

import msgspec
import numpy as np
from torch import Tensor

from anychip.plugin_api import plain_bytes
from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.choices import each_dtype
from anychip_conformance.device import Device
from anychip_conformance.latent_calls import LatentCall, LatentCase, backend_for

DECODE = (Row(0, 3, 1), Row(1, 0, 1), Row(2, 5, 1))
PREFILL = (Row(0, 0, 20), Row(0, 0, 1))
CHUNKS = (Row(0, 7, 30), Row(1, -1, 2), Row(0, 0, 5), Row(1, 4, 1))

LONG = (Row(2, 3, 57), Row(3, 1, 2), Row(1, 0, 1))
"""Rows of so many queries that expanding their context pays, beside others."""
FAR = (Row(72, 9, 1), Row(70, 0, 3), Row(66, 5, 55), Row(0, 2, 1))
"""Contexts that are cut into chunks, whichever form attends to them."""


@kind(
    "latent.attend",
    corpus=[
        LatentCase(rows=DECODE),
        LatentCase(rows=PREFILL),
        LatentCase(rows=CHUNKS),
        LatentCase(rows=CHUNKS, rope=True),
        LatentCase(rows=CHUNKS, pad_tokens=5, pad_rows=2, rope=True),
        LatentCase(rows=CHUNKS, page=1, num_heads=2, latent_dim=48, v_dim=16),
        LatentCase(rows=CHUNKS, window=9),
        LatentCase(rows=DECODE, window=20, rope=True),
        *each_dtype(LatentCase(rows=CHUNKS, rope=True, seed=1)),
        LatentCase(rows=LONG, rope=True),
        LatentCase(rows=LONG, latent_dim=64, nope_dim=8, v_dim=8, rope_dim=8, seed=2),
        LatentCase(rows=LONG, window=40, seed=3),
        LatentCase(rows=FAR, rope=True, num_heads=2, seed=4),
        LatentCase(rows=FAR, window=1100, num_heads=2, seed=5),
    ],
)
def attend(device: Device, case: LatentCase) -> None:
    """Each token's row is written at its slot and nowhere else; every query sees the rows of its own sequence up to its
    own, as keys and as values, with the rotated part in the keys alone."""
    LatentCall.make(device, case).check()


STORED = [LatentCase(rows=DECODE), LatentCase(rows=DECODE, dtype="narrow", latent_dim=24, rope_dim=8)]


class _Pool:
    """A pool whose every block holds numbers of its own, exact in every dtype."""

    def __init__(self, device: Device, case: LatentCase) -> None:
        self.device = device
        self.call = LatentCall.make(device, case)
        shape = tuple(self.call.held().shape)
        self.content = device.held(np.random.default_rng(case.seed).integers(1, 100, shape), case.dtype)
        self.put(list(range(len(self.content))), self.content)

    def put(self, ids: list[int], rows: Tensor) -> None:
        self.call.cache = self.call.backend.import_arrays(self.call.cache, ids, {"latent": rows})

    def holds(self, what: str) -> None:
        self.device.same_bits(what, self.call.held(), self.content)


@kind("latent.layout", corpus=STORED)
def layout(device: Device, case: LatentCase) -> None:
    """Every block size on offer makes a cache of exactly its pages, no smaller than the rows that it must hold."""
    offered = backend_for(device, case).kv_layout()
    assert offered.block_sizes, "no block size is offered"
    for index, size in enumerate(offered.block_sizes):
        least, page = plain_bytes(case.spec, size), offered.page_bytes(size)
        assert page >= least, f"{page} bytes a block of {size}, whose rows have {least}"
        _Pool(device, msgspec.structs.replace(case, page=index)).holds(f"blocks of {size}")


@kind("latent.export_import", corpus=STORED)
def export_import(device: Device, case: LatentCase) -> None:
    """Blocks leave and come back in canonical form, every row of them, in the order of their ids; others stay."""
    pool = _Pool(device, case)
    moved = pool.call.backend.export_arrays(pool.call.cache, [5, 2, 4])
    assert moved.keys() == {"latent"}, f"exported arrays are {sorted(moved)}"
    device.same_bits("exported blocks", moved["latent"].contiguous(), pool.content[[5, 2, 4]].contiguous())
    pool.put([1, 5, 3], moved["latent"].clone())
    pool.content[[1, 5, 3]] = pool.content[[5, 2, 4]].clone()
    pool.holds("blocks after the import")


@kind("latent.copy_blocks", corpus=STORED)
def copy_blocks(device: Device, case: LatentCase) -> None:
    """Destinations become their sources, and nothing else changes."""
    pool = _Pool(device, case)
    pool.call.cache = pool.call.backend.copy_blocks(pool.call.cache, [1, 4], [5, 2])
    pool.content[[5, 2]] = pool.content[[1, 4]].clone()
    pool.holds("blocks after the copy")


@kind("latent.zero_blocks", corpus=STORED)
def zero_blocks(device: Device, case: LatentCase) -> None:
    """Zeroed blocks hold zeros, and nothing else changes."""
    pool = _Pool(device, case)
    pool.call.cache = pool.call.backend.zero_blocks(pool.call.cache, [5, 0])
    pool.content[[5, 0]] = 0
    pool.holds("blocks after zeroing")
