"""Collectives between real processes, two and four of them, and groups within a larger world."""

from __future__ import annotations

from typing import Any

from anychip.plugin_api import Unsupported
from anychip_conformance.case import Nothing, kind
from anychip_conformance.choices import widest
from anychip_conformance.collectives import CollectiveCase
from anychip_conformance.device import Device
from anychip_conformance.ranks import RankPool, group_of

_DEADLINE_S = 120.0
"""The first case starts the ranks."""
PAIR, FOUR = {"world": 2, "members": (0, 1)}, {"world": 4, "members": (0, 1, 2, 3)}


def every(name: str, sizes: tuple[int, ...] = (1, 7, 64), **more: Any) -> list[CollectiveCase]:
    """Both worlds, several sizes, both dtypes at the middle one."""
    cases = [CollectiveCase(name=name, size=size, **world, **more) for world in (PAIR, FOUR) for size in sizes]  # type: ignore[arg-type]
    return [*cases, CollectiveCase(name=name, size=sizes[-1] + 1, dtype="narrow", **FOUR, **more)]  # type: ignore[arg-type]


def check(device: Device, case: CollectiveCase) -> None:
    spec = group_of(case, 0, "file:///nowhere")
    device.need("collectives", device.capabilities.collectives != "none", lambda: device.platform.communicator(spec))
    device.limit("its collectives are the compiler's", device.capabilities.collectives == "runtime")
    device.need_dtype(case.dtype)
    many = len(device.probe.devices)
    device.limit(f"{many} devices, the case has {case.world}", many >= case.world)
    pool = device.resources.setdefault(f"ranks {case.world}", None) or RankPool(device, case.world)
    device.resources[f"ranks {case.world}"] = pool
    try:
        pool.run(case)
    except AssertionError:
        # Ranks that failed may be in the middle of a collective: the next case gets new ones.
        pool.close()
        device.resources[f"ranks {case.world}"] = None
        raise


@kind("comm.all_reduce", profile="distributed", corpus=every("all_reduce", (0, 1, 7, 64, 1009)), deadline_s=_DEADLINE_S)
def all_reduce(device: Device, case: CollectiveCase) -> None:
    """The sum of every element, the tail of an odd size among them, and the same bits at every rank."""
    check(device, case)


@kind(
    "comm.all_gather",
    profile="distributed",
    corpus=[*every("all_gather", (0, 1, 7, 64)), *every("all_gather", (5,), dim=-1), *every("all_gather", (3,), dim=1)],
    deadline_s=_DEADLINE_S,
)
def all_gather(device: Device, case: CollectiveCase) -> None:
    """Parts in group order, along any dimension."""
    check(device, case)


@kind(
    "comm.all_gather_v",
    profile="distributed",
    corpus=[*every("all_gather_v", (0, 1, 7)), *every("all_gather_v", (5,), dim=1)],
    deadline_s=_DEADLINE_S,
)
def all_gather_v(device: Device, case: CollectiveCase) -> None:
    """Uneven parts, an empty one among them, without their padding."""
    check(device, case)


@kind("comm.reduce_scatter", profile="distributed", corpus=every("reduce_scatter", (1, 7)), deadline_s=_DEADLINE_S)
def reduce_scatter(device: Device, case: CollectiveCase) -> None:
    """Each rank's own share of the sum; the input stays."""
    check(device, case)


@kind("comm.reduce_scatter_v", profile="distributed", corpus=every("reduce_scatter_v", (0, 5)), deadline_s=_DEADLINE_S)
def reduce_scatter_v(device: Device, case: CollectiveCase) -> None:
    """Uneven shares of the sum."""
    check(device, case)


@kind("comm.all_to_all", profile="distributed", corpus=every("all_to_all", (1, 7)), deadline_s=_DEADLINE_S)
def all_to_all(device: Device, case: CollectiveCase) -> None:
    """Share j goes to rank j."""
    check(device, case)


@kind("comm.all_to_all_v", profile="distributed", corpus=every("all_to_all_v", (0, 4)), deadline_s=_DEADLINE_S)
def all_to_all_v(device: Device, case: CollectiveCase) -> None:
    """Uneven shares, empty ones among them."""
    check(device, case)


@kind("comm.broadcast", profile="distributed", corpus=every("broadcast", (1, 7)), deadline_s=_DEADLINE_S)
def broadcast(device: Device, case: CollectiveCase) -> None:
    """From every root in turn."""
    check(device, case)


@kind("comm.send_recv", profile="distributed", corpus=every("send_recv", (1, 7)), deadline_s=_DEADLINE_S)
def send_recv(device: Device, case: CollectiveCase) -> None:
    """Point to point around the ring."""
    check(device, case)


@kind(
    "comm.send_ahead",
    profile="distributed",
    corpus=[
        CollectiveCase(name="send_ahead", **world, axes={"pp": world["world"]}, size=size)  # type: ignore[arg-type]
        for world in (PAIR, FOUR)
        for size in (1, 7)
    ],
    deadline_s=_DEADLINE_S,
)
def send_ahead(device: Device, case: CollectiveCase) -> None:
    """Along the axis of a pipeline, who sends goes on before anybody asks for it, and may write to what was sent; it
    comes in the order in which it was sent. The axis may be refused, with a reason."""
    check(device, case)


@kind(
    "comm.order", profile="distributed", corpus=[*every("order", (7,)), *every("barrier", (1,))], deadline_s=_DEADLINE_S
)
def order(device: Device, case: CollectiveCase) -> None:
    """Forty collectives in a row keep their order; barriers pass."""
    check(device, case)


@kind(
    "comm.subgroup",
    profile="distributed",
    corpus=[
        CollectiveCase(name=name, world=4, members=members, size=7)  # type: ignore[arg-type]
        for name in ("all_reduce", "all_gather", "broadcast")
        for members in ((0, 2), (1, 3), (3, 1), (0, 1, 3))
    ],
    deadline_s=_DEADLINE_S,
)
def subgroup(device: Device, case: CollectiveCase) -> None:
    """Groups that are not the world, in their own order, beside ranks that take no part."""
    check(device, case)


_MESHES: tuple[dict[str, Any], ...] = (
    {"axes": {"dp": 2, "tp": 2}, "joined": ("dp", "tp")},
    {"axes": {"ep": 2, "tp": 2}},
    {"axes": {"pp": 2, "tp": 2}},
    {"axes": {"cp": 4}},
    {"axes": {"dp": 2, "cp": 2}, "joined": ("cp", "dp")},
)


@kind(
    "comm.mesh",
    profile="distributed",
    corpus=[CollectiveCase(name="mesh", **FOUR, size=size, **mesh) for mesh in _MESHES for size in (1, 7)],  # type: ignore[arg-type]
    deadline_s=_DEADLINE_S,
)
def mesh(device: Device, case: CollectiveCase) -> None:
    """Groups along the axes of a mesh, in turns: each meets its own ranks, in the order of their coordinates. An axis
    may be refused, with a reason."""
    check(device, case)


@kind(
    "comm.restore",
    profile="distributed",
    corpus=[CollectiveCase(name="close_restore", **FOUR, size=9)],
    deadline_s=_DEADLINE_S,
)
def restore(device: Device, case: CollectiveCase) -> None:
    """A group works again after close and restore, as when workers wake."""
    check(device, case)


@kind("comm.single")
def single(device: Device, case: Nothing) -> None:
    """A group of one gives back what it gets; without collectives, a larger group is refused."""
    alone = CollectiveCase(name="all_reduce", world=1, members=(0,))
    comm = device.platform.communicator(group_of(alone, 0, ""))
    x = device.tensor([[1.0, 2.0]], widest(device.capabilities))
    for result in (comm.all_reduce(x.clone()), comm.all_gather(x.clone(), dim=0), comm.broadcast(x.clone())):
        device.same_bits("result of a group of one", result, x)
    if device.capabilities.collectives == "none":
        try:
            device.platform.communicator(group_of(CollectiveCase(name="all_reduce"), 0, "file:///nowhere"))
        except Unsupported:
            return
        raise AssertionError("no collectives are declared, and a group of two is not refused")
