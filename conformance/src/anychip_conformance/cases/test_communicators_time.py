"""Collectives that are read later, that come many times, that carry what is no number, and that lie within a graph."""

from __future__ import annotations

from anychip.plugin_api import GraphLevel
from anychip_conformance.case import kind
from anychip_conformance.cases.test_communicators import FOUR, PAIR, check
from anychip_conformance.collectives import CollectiveCase
from anychip_conformance.device import Device

_DEADLINE_S = 120.0


@kind(
    "comm.kept_results",
    profile="distributed",
    corpus=[CollectiveCase(name="kept", size=size, **world) for world, size in ((PAIR, 7), (PAIR, 1009), (FOUR, 7))],  # type: ignore[arg-type]
    deadline_s=_DEADLINE_S,
)
def kept_results(device: Device, case: CollectiveCase) -> None:
    """What a collective gave stays when later ones run and its input is overwritten."""
    check(device, case)


@kind(
    "comm.many_calls",
    profile="distributed",
    corpus=[CollectiveCase(name="many", size=7, **PAIR)],  # type: ignore[arg-type]
    deadline_s=_DEADLINE_S,
)
def many_calls(device: Device, case: CollectiveCase) -> None:
    """The n-th sum of one group is as right as the first."""
    check(device, case)


@kind(
    "comm.bad_values",
    profile="distributed",
    corpus=[CollectiveCase(name="bad_values", size=9, dtype=dtype, **PAIR) for dtype in ("any", "narrow")],  # type: ignore[arg-type]
    deadline_s=_DEADLINE_S,
)
def bad_values(device: Device, case: CollectiveCase) -> None:
    """NaN and infinity of one rank reach the others' results at their own places, and no other."""
    check(device, case)


@kind(
    "graph.collectives",
    profile="graph",
    corpus=[CollectiveCase(name="graph", size=size, **world) for world, size in ((PAIR, 1), (PAIR, 64), (FOUR, 7))],  # type: ignore[arg-type]
    deadline_s=_DEADLINE_S,
)
def in_graph(device: Device, case: CollectiveCase) -> None:
    """Collectives within a captured region run again at each replay, with what their inputs hold by then, and the
    region goes on with what they gave."""
    device.need("graphs", device.capabilities.graph_level >= GraphLevel.FULL)
    device.need("collectives in graphs", device.platform.graph_capture().collectives)
    check(device, case)
