"""Sparse latent attention: queries choose tokens by index keys, and attend to these alone."""

from __future__ import annotations

import numpy as np

from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.choices import each_dtype
from anychip_conformance.device import Device
from anychip_conformance.sparse_calls import SparseCall, SparseCase

DECODE = (Row(1, 3, 1), Row(2, 0, 1), Row(0, 5, 1))
CHUNKS = (Row(0, 7, 30), Row(1, -1, 2), Row(0, 0, 5), Row(1, 4, 1))
FAR = (Row(30, 9, 1), Row(6, 5, 20))


@kind(
    "latent.choose",
    corpus=[
        SparseCase(rows=DECODE, whole=True),
        SparseCase(rows=CHUNKS, whole=True),
        SparseCase(rows=CHUNKS, whole=True, pad_tokens=5, pad_rows=2, page=1, index_heads=1, top_k=1),
        SparseCase(rows=CHUNKS, rope=True, seed=1),
        SparseCase(rows=CHUNKS, rope=True, interleaved=True, index_dim=32, seed=2),
        *each_dtype(SparseCase(rows=CHUNKS, whole=True, top_k=20, seed=3)),
        SparseCase(rows=FAR, whole=True, top_k=33, seed=4),
        SparseCase(rows=FAR, index_heads=8, top_k=64, seed=5),
        SparseCase(rows=CHUNKS, whole=True, top_k=200, seed=6),
    ],
)
def choose(device: Device, case: SparseCase) -> None:
    """Each token's index key is written at its slot. A query chooses the tokens of the greatest scores among those up
    to itself, of equal scores the lower positions, and all where they are no more than it may choose."""
    SparseCall.make(device, case).check_choice()


@kind(
    "latent.chosen",
    corpus=[
        SparseCase(rows=DECODE),
        SparseCase(rows=CHUNKS, rope=True),
        SparseCase(rows=CHUNKS, pad_tokens=5, pad_rows=2, page=1, num_heads=2),
        *each_dtype(SparseCase(rows=CHUNKS, seed=1)),
        SparseCase(rows=FAR, top_k=48, seed=2),
    ],
)
def attend_chosen(device: Device, case: SparseCase) -> None:
    """A query attends to the rows at the positions that it is given, and to no others."""
    call = SparseCall.make(device, case)
    call.check_attention(call.random_choice())


@kind(
    "latent.chosen_all",
    corpus=[SparseCase(rows=CHUNKS, rope=True, top_k=80), SparseCase(rows=DECODE, top_k=64)],
)
def chosen_all(device: Device, case: SparseCase) -> None:
    """Where a query may choose as many tokens as there are, it attends to all: sparse attention is dense attention."""
    call = SparseCall.make(device, case)
    longest = max(c + q for c, q in zip(call.dense.batch.contexts, call.dense.batch.queries, strict=True))
    device.limit(f"blocks of {call.dense.block_size} tokens make the sequences longer", longest <= case.top_k)
    call.check_attention(call.choose())


@kind("latent.index_storage", corpus=[SparseCase(rows=DECODE), SparseCase(rows=DECODE, dtype="narrow", index_dim=8)])
def index_storage(device: Device, case: SparseCase) -> None:
    """Index keys leave, come back, are copied and are cleared with the rows that they stand beside."""
    call = SparseCall.make(device, case).dense
    rng = np.random.default_rng(case.seed)
    content = {
        name: device.tensor(rng.integers(1, 100, tuple(call.held(name).shape)), case.dtype)
        for name in ("latent", "index")
    }

    def holds(what: str) -> None:
        for name, values in content.items():
            device.same_bits(f"{name} of blocks after {what}", call.held(name), values)

    call.cache = call.backend.import_arrays(call.cache, range(call.num_blocks), content)
    holds("the import")
    moved = call.backend.export_arrays(call.cache, [3, 1, 2])
    assert moved.keys() == {"latent", "index"}, f"exported arrays are {sorted(moved)}"
    for name, values in moved.items():
        device.same_bits(f"exported {name}", values.contiguous(), content[name][[3, 1, 2]].contiguous())
    call.cache = call.backend.copy_blocks(call.cache, [1, 4], [2, 5])
    for values in content.values():
        values[[2, 5]] = values[[1, 4]].clone()
    holds("the copy")
    call.cache = call.backend.zero_blocks(call.cache, [4, 0])
    for values in content.values():
        values[[4, 0]] = 0
    holds("zeroing")
