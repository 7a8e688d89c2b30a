"""Experts on several ranks: rows that were dispatched, tokens on their way there and back, experts that move."""

from __future__ import annotations

from typing import Any

import numpy as np

from anychip.plugin_api import Routing, Unsupported
from anychip_conformance.case import kind
from anychip_conformance.cases.test_communicators import check as check_ranks
from anychip_conformance.cases.test_moe import MOE_SCHEMES, Loaded, MoECase
from anychip_conformance.choices import each_dtype
from anychip_conformance.collectives import CollectiveCase
from anychip_conformance.device import Device
from anychip_conformance.verdicts import Refused

_DEADLINE_S = 120.0
"""The first case starts the ranks."""


@kind(
    "moe.dispatched_rows",
    corpus=each_dtype(
        MoECase(local=4, tokens=9),
        MoECase(local=8, tokens=1),
        MoECase(local=2, tokens=33, bias=True),
        MoECase(tokens=0),
    ),
)
def dispatched_rows(device: Device, case: MoECase) -> None:
    """Rows that came to a rank have one expert each, whatever the spec's top_k, by its place among those held here, and
    a weight of one."""
    loaded = Loaded(device, case)
    x, _, _ = loaded.inputs()
    held = len(case.here)
    places = (np.arange(case.tokens) * 5 + 1) % held
    routing = Routing(device.tensor(np.ones((case.tokens, 1)), "float32"), device.tensor(places[:, None], "int64"))
    result = loaded.kernel.experts(x, routing, loaded.packed)
    loaded.judge_rows(x, places + case.here.start, result)


@kind(
    "moe.moved_expert",
    corpus=[
        *each_dtype(MoECase(tokens=9), MoECase(tokens=9, bias=True)),
        *[MoECase(tokens=9, scheme=scheme) for scheme in MOE_SCHEMES],
    ],
)
def moved_expert(device: Device, case: MoECase) -> None:
    """What is kept of an expert, copied into another slot, is that expert there; the other slots are as they were."""
    loaded = Loaded(device, case)
    try:
        found = loaded.kernel.expert_tensors(loaded.packed, 1)
    except Unsupported as refusal:
        raise Refused("experts that move", str(refusal)) from None
    slots = list(range(case.experts))
    for to, source in ((1, 6), (0, 2)):
        for held, new in zip(expert(loaded, to), [each.clone() for each in expert(loaded, source)], strict=True):
            assert (held.shape, held.dtype) == (new.shape, new.dtype), "experts are kept in unlike tensors"
            held.copy_(new)
        slots[to] = source
    assert len(found) == len(expert(loaded, 0))
    x, _, _ = loaded.inputs()
    places = np.arange(case.tokens) % case.experts
    routing = Routing(device.tensor(np.ones((case.tokens, 1)), "float32"), device.tensor(places[:, None], "int64"))
    loaded.judge_rows(x, np.array(slots)[places], loaded.kernel.experts(x, routing, loaded.packed))


def expert(loaded: Loaded, slot: int) -> Any:
    return loaded.kernel.expert_tensors(loaded.packed, slot)


@kind(
    "moe.dispatch",
    profile="distributed",
    corpus=[
        CollectiveCase(name="experts", world=2, members=(0, 1), size=5, width=32),
        CollectiveCase(name="experts", world=4, members=(0, 1, 2, 3), size=3, width=32),
        CollectiveCase(name="experts", world=4, members=(0, 1, 2, 3), size=0, width=32),
        CollectiveCase(name="experts", world=2, members=(0, 1), size=6, width=32, dtype="narrow"),
    ],
    deadline_s=_DEADLINE_S,
)
def dispatch(device: Device, case: CollectiveCase) -> None:
    """Tokens reach the ranks of their experts and come back weighted, each rank with a number of its own, none among
    them; padded tokens reach nobody."""
    check_ranks(device, case)
