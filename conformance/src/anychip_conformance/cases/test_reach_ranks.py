"""Collectives of large messages (reach.REACH), of views, and many of them in a row."""

from __future__ import annotations

from anychip_conformance.case import kind
from anychip_conformance.cases import test_communicators
from anychip_conformance.cases.test_communicators import FOUR, PAIR
from anychip_conformance.collectives import CollectiveCase, CollectiveName
from anychip_conformance.device import Device
from anychip_conformance.forms import FORMS
from anychip_conformance.reach import dimension
from anychip_conformance.visits import Visit, VisitCase, Visits

_DEADLINE_S = 240.0


def _message(name: CollectiveName, num_bytes: int, shares: int = 1) -> CollectiveCase:
    """Of four bytes an element, where the device has such; `shares`: elements are divided among so many ranks."""
    return CollectiveCase(name=name, size=num_bytes // 4 // shares, width=1, **PAIR)  # type: ignore[arg-type]


MESSAGES = Visits(
    (
        Visit(test_communicators.all_reduce, "message", lambda n: _message("all_reduce", n)),
        Visit(test_communicators.all_gather, "message", lambda n: _message("all_gather", n)),
        Visit(test_communicators.all_gather_v, "message", lambda n: _message("all_gather_v", n), most=524_292),
        Visit(test_communicators.reduce_scatter, "message", lambda n: _message("reduce_scatter", n, 2)),
        Visit(
            test_communicators.reduce_scatter_v, "message", lambda n: _message("reduce_scatter_v", n, 4), most=524_292
        ),
        Visit(test_communicators.all_to_all, "message", lambda n: _message("all_to_all", n, 2)),
        Visit(test_communicators.broadcast, "message", lambda n: _message("broadcast", n)),
        Visit(test_communicators.send_recv, "message", lambda n: _message("send_recv", n)),
        *[
            Visit(
                test_communicators.subgroup,
                "ranks",
                lambda n, name=name: CollectiveCase(
                    name=name, world=4 if n > 2 else 2, members=tuple(range(n)), size=999
                ),  # type: ignore[misc]
                variant=name,
            )
            for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
        ],
    )
)


@kind("comm.reach", profile="distributed", corpus=MESSAGES.corpus, deadline_s=_DEADLINE_S)
def messages(device: Device, case: VisitCase) -> None:
    """Messages up to the largest that the group was opened for, around every size at which transports change, and
    groups of two, three and four."""
    MESSAGES.check(device, case)


@kind(
    "comm.calls",
    profile="distributed",
    corpus=[CollectiveCase(name="order", size=3, rounds=max(dimension("steps").sizes) // 2 + 10, **PAIR)],  # type: ignore[arg-type]
    deadline_s=_DEADLINE_S,
)
def calls(device: Device, case: CollectiveCase) -> None:
    """More collectives in a row than a counter of one byte counts."""
    test_communicators.order.check(device, case)


@kind(
    "comm.form",
    profile="distributed",
    corpus=[
        CollectiveCase(name=name, size=9, width=5, form=form, **group)  # type: ignore[arg-type]
        for form in FORMS
        if form not in ("expanded", "turned")
        for name in ("all_reduce", "all_gather", "all_gather_v", "reduce_scatter", "all_to_all", "broadcast")
        for group in ((PAIR,) if name != "all_reduce" else (PAIR, FOUR))
    ],
    deadline_s=_DEADLINE_S,
)
def form(device: Device, case: CollectiveCase) -> None:
    """Collectives of views: what lies between and around a rank's values takes no part."""
    test_communicators.check(device, case)
