"""The KV cache as storage: layouts, moving blocks, saturation."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import AttentionBackend
from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase, Call, backend_for
from anychip_conformance.paged_judge import check_attention

_BLOCKS = 9
DECODE = (Row(0, 3, 2), Row(1, 0, 1))
CASES = [
    AttentionCase(rows=DECODE, dtype=dtype, head_dim=dim, num_kv_heads=kv_heads)  # type: ignore[arg-type]
    for dtype in ("float32", "bfloat16", "float16")
    for dim, kv_heads in ((16, 2), (40, 1))
]
BYTE_CASES = [AttentionCase(rows=DECODE, kv=kv) for kv in ("fp8", "int8")]  # type: ignore[arg-type]


class Pool:
    """A cache whose every block holds numbers of its own, exact in every dtype."""

    def __init__(self, device: Device, case: AttentionCase, block_size: int | None = None) -> None:
        self.device = device
        self.backend: AttentionBackend = backend_for(device, case)
        layout = self.backend.kv_layout()
        self.size = block_size or layout.block_sizes[0]
        raw = device.platform.empty((_BLOCKS * layout.page_bytes(self.size),), "uint8", "kv")
        shape = (_BLOCKS, 2, self.size, case.num_kv_heads, case.head_dim)
        numbers = np.random.default_rng(case.seed).integers(1, 100, shape)
        self.content = device.held(numbers, "uint8" if case.kv != "same" else case.dtype)
        self.cache: Any = self.backend.make_cache(raw, _BLOCKS, self.size)
        self.cache = self.backend.import_blocks(self.cache, list(range(_BLOCKS)), self.content)

    def holds(self, what: str, expected: Tensor) -> None:
        got = self.backend.export_blocks(self.cache, list(range(_BLOCKS)))
        self.device.same_bits(what, got.contiguous(), expected.contiguous())


@kind("kv.layout", corpus=[*CASES, *BYTE_CASES])
def layout(device: Device, case: AttentionCase) -> None:
    """Every block size on offer makes a cache of exactly its pages, no smaller than what it must hold."""
    backend = backend_for(device, case)
    offered = backend.kv_layout()
    assert offered.block_sizes, "no block size is offered"
    itemsize = 1 if case.kv != "same" else 4 if case.dtype == "float32" else 2
    for size in offered.block_sizes:
        least = 2 * size * case.num_kv_heads * case.head_dim * itemsize
        page = offered.page_bytes(size)
        assert page >= least, f"{page} bytes a block of {size}, which holds {least} bytes of keys and values"
        pool = Pool(device, case, size)
        pool.holds(f"blocks of {size}", pool.content)


@kind("kv.export_import", corpus=[*CASES, *BYTE_CASES])
def export_import(device: Device, case: AttentionCase) -> None:
    """Blocks leave and come back in canonical form, in the order of their ids; others stay."""
    pool = Pool(device, case)
    moved = pool.backend.export_blocks(pool.cache, [5, 2, 7])
    device.same_bits("exported blocks", moved.contiguous(), pool.content[[5, 2, 7]].contiguous())
    pool.cache = pool.backend.import_blocks(pool.cache, [1, 5, 3], moved)
    expected = pool.content.clone()
    expected[[1, 5, 3]] = pool.content[[5, 2, 7]]
    pool.holds("blocks after the import", expected)


@kind("kv.canonical", corpus=[*CASES, *BYTE_CASES])
def canonical(device: Device, case: AttentionCase) -> None:
    """What leaves by name has the shape and the dtype that the spec's canonical form says, and comes back from it."""
    pool, arrays = Pool(device, case), {array.name: array for array in case.spec.canonical(1)}
    moved = pool.backend.export_arrays(pool.cache, [5, 2, 7])
    assert moved.keys() == arrays.keys(), (
        f"exported arrays are {sorted(moved)}, the canonical form has {sorted(arrays)}"
    )
    for array in case.spec.canonical(pool.size):
        found = moved[array.name]
        assert tuple(found.shape) == (3, *array.shape), f"{array.name} has shape {tuple(found.shape)}"
        assert str(found.dtype) == f"torch.{array.dtype}", f"{array.name} is {found.dtype}, not {array.dtype}"
    pool.cache = pool.backend.import_arrays(pool.cache, [1, 5, 3], {name: x.clone() for name, x in moved.items()})
    expected = pool.content.clone()
    expected[[1, 5, 3]] = pool.content[[5, 2, 7]]
    pool.holds("blocks after the import", expected)


@kind("kv.copy_blocks", corpus=[*CASES, *BYTE_CASES])
def copy_blocks(device: Device, case: AttentionCase) -> None:
    """Destinations become their sources, and nothing else changes."""
    pool = Pool(device, case)
    pool.cache = pool.backend.copy_blocks(pool.cache, [1, 4], [8, 2])
    expected = pool.content.clone()
    expected[[8, 2]] = pool.content[[1, 4]]
    pool.holds("blocks after the copy", expected)


@kind("kv.zero_blocks", corpus=[*CASES, *BYTE_CASES])
def zero_blocks(device: Device, case: AttentionCase) -> None:
    """Zeroed blocks hold zeros, and nothing else changes."""
    pool = Pool(device, case)
    pool.cache = pool.backend.zero_blocks(pool.cache, [6, 0])
    expected = pool.content.clone()
    expected[[6, 0]] = 0
    pool.holds("blocks after zeroing", expected)


@kind(
    "kv.padding_slot",
    corpus=[
        AttentionCase(rows=DECODE, pad_tokens=4, dtype=dtype)  # type: ignore[arg-type]
        for dtype in ("any", "narrow")
    ],
)
def padding_slot(device: Device, case: AttentionCase) -> None:
    """A token whose slot is -1 is written nowhere: not at the pool's end, not in the null block."""
    check_attention(device, case)


@kind(
    "kv.saturation",
    profile="quantization",
    corpus=[AttentionCase(rows=DECODE, kv=kv, value_offset=1000.0) for kv in ("fp8", "int8")],  # type: ignore[arg-type]
)
def saturation(device: Device, case: AttentionCase) -> None:
    """Values beyond the range of a one-byte cache become its largest, never NaN, and never wrap."""
    call = Call.make(device, case)
    call.run()
    written = torch.from_numpy(call.batch.slots)
    held = call.blocks().to("cpu")[written // call.block_size, 1, written % call.block_size].contiguous()
    values = held.view(getattr(torch, case.kv_dtype)).float()
    most = 448.0 if case.kv == "fp8" else 127.0
    assert bool((values == most).all()), f"stored {values.unique().tolist()[:5]}, expected {most} everywhere"


@kind(
    "kv.write_order", corpus=[msgspec.structs.replace(case, rows=(Row(0, 0, 40), Row(1, 5, 33))) for case in CASES[:2]]
)
def write_order(device: Device, case: AttentionCase) -> None:
    """Long runs of tokens across blocks each reach their own slot."""
    check_attention(device, case)
