"""Many blocks at once (reach.REACH): copied, zeroed, taken out and put back."""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.choices import CaseDtype, resolved
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase, backend_for
from anychip_conformance.visits import Visit, VisitCase, Visits

_DEADLINE_S = 240.0
_LAYER = AttentionCase(rows=(Row(0, 1, 1),), num_heads=1, num_kv_heads=1, head_dim=8)


class BlocksCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    count: int
    dtype: CaseDtype = "any"
    seed: int = 0


@kind("kv.many_blocks", corpus=[BlocksCase(count=40), BlocksCase(count=40, dtype="narrow")], quick=0)
def many_blocks(device: Device, case: BlocksCase) -> None:
    """Many blocks in one call: each moves to its own place, and the rest stay."""
    _move(device, resolved(msgspec.structs.replace(_LAYER, dtype=case.dtype, seed=case.seed), device), case.count)


MOVES = Visits((Visit(many_blocks, "blocks moved", lambda n: BlocksCase(count=n)),))


@kind("kv.reach", corpus=MOVES.corpus, quick=0, deadline_s=_DEADLINE_S)
def moved_at_once(device: Device, case: VisitCase) -> None:
    """Hundreds of blocks in one call: the last of a list moves as the first does."""
    MOVES.check(device, case)


def _move(device: Device, case: AttentionCase, count: int) -> None:
    backend, rng = backend_for(device, case), np.random.default_rng((case.seed, count))
    layout, num_blocks = backend.kv_layout(), 2 * count + 1
    size = layout.block_sizes[0]
    device.limit(
        f"a cache has {device.capabilities.max_slots} slots",
        device.capabilities.max_slots is None or num_blocks * size <= device.capabilities.max_slots,
    )
    content = device.held(rng.integers(1, 100, (num_blocks, 2, size, case.num_kv_heads, case.head_dim)), case.dtype)
    raw = device.platform.empty((num_blocks * layout.page_bytes(size),), "uint8", "kv")
    every = list(range(num_blocks))
    cache = backend.import_blocks(backend.make_cache(raw, num_blocks, size), every, content)
    drawn = (rng.permutation(num_blocks - 1) + 1).tolist()
    sources, places = drawn[:count], drawn[count:]

    def holds(what: str) -> None:
        found = backend.export_blocks(cache, every)
        device.same_bits(f"{count} blocks {what}", found.contiguous(), content.contiguous())

    cache = backend.copy_blocks(cache, sources, places)
    content[torch.tensor(places)] = content[torch.tensor(sources)]
    holds("copied")
    given = backend.export_blocks(cache, sources).clone()
    cache = backend.import_blocks(cache, places[::-1], given)
    content[torch.tensor(places[::-1])] = content[torch.tensor(sources)]
    holds("taken out and put back")
    cache = backend.zero_blocks(cache, sources)
    content[torch.tensor(sources)] = 0
    holds("zeroed")
