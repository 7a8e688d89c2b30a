"""What one rank does in a case of the communicator section, and what it must come back with. Values are integers that
code rank and place, exact in every dtype, so that a result is right to the bit or wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from torch import Tensor

from anychip.plugin_api import AXES, MAX_SENT, Axis, Communicator, Mesh, MeshShape, ShapeKey
from anychip_conformance.choices import CaseDtype
from anychip_conformance.device import Device, bits, seen
from anychip_conformance.expert_ranks import experts
from anychip_conformance.forms import Form, laid_out
from anychip_conformance.oracle.vectorised import Bounded

CollectiveName = Literal["all_reduce", "all_gather", "all_gather_v", "reduce_scatter", "reduce_scatter_v", "all_to_all",
                         "all_to_all_v", "broadcast", "send_recv", "send_ahead", "barrier", "order", "close_restore",
                         "mesh", "experts", "graph", "kept", "many", "bad_values"]  # fmt: skip


MANY_CALLS = 70
"""Of one group."""


class CollectiveCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`members` are world ranks out of `world`, in group order; ranks that are not members stand by. `size` is the
    length of the dimension that the collective works on. `axes` are the sizes of a mesh of all members, and `joined`
    what its axis ep is joined from."""

    name: CollectiveName
    world: int = 2
    members: tuple[int, ...] = (0, 1)
    size: int = 8
    width: int = 3
    dim: int = 0
    dtype: CaseDtype = "any"
    axes: dict[Axis, int] = {}
    joined: tuple[Axis, ...] = ()
    form: Form = "tidy"
    """Of what each rank brings."""
    rounds: int = 20
    """Of order: two collectives each."""

    @property
    def mesh(self) -> MeshShape:
        return MeshShape(**self.axes, joined={"ep": self.joined} if self.joined else {})


@dataclass(slots=True)
class Member:
    device: Device
    comm: Communicator
    case: CollectiveCase
    mesh: Mesh = field(default_factory=Mesh.alone)
    """Of a case with axes; it has no `comm`."""

    @property
    def rank(self) -> int:
        return self.case.members.index(self.comm.spec.rank)

    @property
    def count(self) -> int:
        return len(self.case.members)

    def values(self, rank: int, rows: int | None = None) -> np.ndarray:
        """A rank's own [rows, width]: small integers, different at every rank and place."""
        rows = self.case.size if rows is None else rows
        return (np.arange(rows * self.case.width).reshape(rows, self.case.width) * 7 + rank * 13) % 31 + rank

    def tensor(self, values: np.ndarray) -> Tensor:
        return laid_out(self.device.held(values, self.case.dtype), self.case.form, written=True)

    def same(self, what: str, actual: Tensor, expected: np.ndarray) -> None:
        exact = Bounded(expected.astype(float), np.zeros(expected.shape))
        self.device.compare(f"rank {self.rank}: {what}", actual, exact)

    def uneven(self) -> list[int]:
        """Sizes by rank, zero among them where there are more than two."""
        sizes = [self.case.size + 2 * i + 1 for i in range(self.count)]
        if self.count > 2:
            sizes[1] = 0
        return sizes


def all_reduce(m: Member) -> bytes:
    total = sum(m.values(r) for r in range(m.count))
    result = m.comm.all_reduce(m.tensor(m.values(m.rank)))
    m.same("sum", result, np.asarray(total).reshape(m.case.size, m.case.width))
    # Fractions: every rank must get the same bits, or ranks drift apart.
    noisy = np.random.default_rng(m.rank).normal(size=(m.case.size, m.case.width))
    return bits(m.comm.all_reduce(m.tensor(noisy))).tobytes()


def all_gather(m: Member) -> bytes:
    parts = [m.values(r) for r in range(m.count)]
    own = m.tensor(m.values(m.rank))
    m.same("gathered", m.comm.all_gather(own, dim=m.case.dim), np.concatenate(parts, axis=m.case.dim))
    return b""


def all_gather_v(m: Member) -> bytes:
    sizes = m.uneven()
    parts = [m.values(r, sizes[r]) for r in range(m.count)]
    own = m.tensor(parts[m.rank])
    if m.case.dim:
        parts, own = [part.T for part in parts], own.T.contiguous()
    gathered = m.comm.all_gather_v(own, sizes, dim=m.case.dim)
    m.same("gathered", gathered, np.concatenate(parts, axis=m.case.dim))
    return b""


def reduce_scatter(m: Member) -> bytes:
    rows = m.case.size * m.count
    total = np.asarray(sum(m.values(r, rows) for r in range(m.count)))
    share = total[m.rank * m.case.size : (m.rank + 1) * m.case.size]
    own = m.tensor(m.values(m.rank, rows))
    m.same("share of the sum", m.comm.reduce_scatter(own), share)
    m.same("input", own, m.values(m.rank, rows))
    return b""


def reduce_scatter_v(m: Member) -> bytes:
    sizes = m.uneven()
    starts = np.cumsum([0, *sizes])
    total = np.asarray(sum(m.values(r, sum(sizes)) for r in range(m.count)))
    result = m.comm.reduce_scatter_v(m.tensor(m.values(m.rank, sum(sizes))), sizes)
    m.same("share of the sum", result, total[starts[m.rank] : starts[m.rank + 1]])
    return b""


def all_to_all(m: Member) -> bytes:
    rows = m.case.size * m.count
    mine = slice(m.rank * m.case.size, (m.rank + 1) * m.case.size)
    expected = np.concatenate([m.values(r, rows)[mine] for r in range(m.count)])
    m.same("received", m.comm.all_to_all(m.tensor(m.values(m.rank, rows))), expected)
    return b""


def all_to_all_v(m: Member) -> bytes:
    def rows(source: int, target: int) -> int:
        return (source * 2 + target) % 3 + (m.case.size if source == target else 0)

    send = [rows(m.rank, target) for target in range(m.count)]
    receive = [rows(source, m.rank) for source in range(m.count)]
    expected = []
    for source in range(m.count):
        counts = [rows(source, target) for target in range(m.count)]
        starts = np.cumsum([0, *counts])
        expected.append(m.values(source, sum(counts))[starts[m.rank] : starts[m.rank + 1]])
    result = m.comm.all_to_all_v(m.tensor(m.values(m.rank, sum(send))), send, receive)
    m.same("received", result, np.concatenate(expected))
    return b""


def broadcast(m: Member) -> bytes:
    for root in range(m.count):
        m.same(f"from {root}", m.comm.broadcast(m.tensor(m.values(m.rank)), root=root), m.values(root))
    return b""


def send_recv(m: Member) -> bytes:
    """Around the ring, even members first."""
    right, left = (m.rank + 1) % m.count, (m.rank - 1) % m.count
    empty = m.tensor(np.zeros((m.case.size, m.case.width)))
    if m.rank % 2 == 0:
        m.comm.send(m.tensor(m.values(m.rank)), right)
        got = m.comm.recv(empty, left)
    else:
        got = m.comm.recv(empty, left)
        m.comm.send(m.tensor(m.values(m.rank)), right)
    m.same("received", got, m.values(left))
    return b""


def send_ahead(m: Member) -> bytes:
    """Everybody sends to the right as much as may be on its way, before anybody asks for anything; the tensors that
    were sent are written over at once. Sizes differ, an empty one among them."""
    comm, right, left = m.mesh.axis("pp"), (m.rank + 1) % m.count, (m.rank - 1) % m.count
    sizes = [m.case.size + step % 3 - 1 for step in range(MAX_SENT)]
    for step, rows in enumerate(sizes):
        x = m.tensor(m.values(m.rank, rows) + step)
        comm.send(x, right)
        x.zero_()
    for step, rows in enumerate(sizes):
        got = comm.recv(m.tensor(np.zeros((rows, m.case.width))), left)
        m.same(f"tensor {step}", got, m.values(left, rows) + step)
    return b""


def barrier(m: Member) -> bytes:
    for _ in range(3):
        m.comm.barrier()
    return b""


def order(m: Member) -> bytes:
    """Many collectives in a row, as the layers of a model issue them."""
    for step in range(m.case.rounds):
        more = step % 20  # sums stay exact
        reduced = m.comm.all_reduce(m.tensor(m.values(m.rank) + more))
        m.same(f"sum {step}", reduced, np.asarray(sum(m.values(r) + more for r in range(m.count))))
        gathered = m.comm.all_gather(m.tensor(m.values(m.rank, 2) + more), dim=0)
        m.same(f"gathered {step}", gathered, np.concatenate([m.values(r, 2) + more for r in range(m.count)]))
    return b""


def close_restore(m: Member) -> bytes:
    m.comm.close()
    m.comm.restore()
    return all_reduce(m)


def graph(m: Member) -> bytes:
    """Captured once, replayed with other values: sums and gathered parts are of what the ranks hold by then."""
    graphs, fixed = m.device.platform.graph_capture(), m.tensor(m.values(m.rank))
    rows = m.case.size
    key = ShapeKey(num_tokens=rows, num_reqs=rows, num_samples=rows, max_query_len=1, num_pages=1)

    def step() -> tuple[Tensor, Tensor]:
        total = m.comm.all_reduce(fixed * 1) * 2
        return total, m.comm.all_gather(total + fixed, dim=0)

    handle = graphs.capture(step, key, communicators=[m.comm])
    for turn in (1, 2, 3, 1):
        fixed.copy_(m.tensor(m.values(m.rank) * turn))
        total, gathered = graphs.run(handle, [])
        own = [m.values(rank) * turn for rank in range(m.count)]
        wanted = np.asarray(sum(own)) * 2
        m.same(f"sum of replay {turn}", total, wanted)
        m.same(f"gathered by replay {turn}", gathered, np.concatenate([wanted + mine for mine in own]))
    return b""


def kept(m: Member) -> bytes:
    """Results, after what they were made of was overwritten and the group went on."""
    own = [m.tensor(m.values(m.rank) + turn) for turn in range(5)]
    found = []
    for turn, mine in enumerate(own):
        given = mine.clone()
        gathered = m.comm.all_gather(given, dim=0)
        given.fill_(5)
        found.append((m.comm.all_reduce(mine.clone()), gathered, m.comm.broadcast(mine.clone(), root=turn % m.count)))
    for turn, (total, gathered, received) in enumerate(found):
        parts = [m.values(rank) + turn for rank in range(m.count)]
        m.same(f"sum {turn}, read later", total, np.asarray(sum(parts)))
        m.same(f"gathered {turn}, read later", gathered, np.concatenate(parts))
        m.same(f"received {turn}, read later", received, parts[turn % m.count])
    return b""


def many(m: Member) -> bytes:
    """More calls of one group than small counters hold."""
    for call in range(MANY_CALLS):
        total = m.comm.all_reduce(m.tensor(m.values(m.rank) + call % 3))
        m.same(f"sum of call {call + 1}", total, np.asarray(sum(m.values(r) + call % 3 for r in range(m.count))))
    return b""


def bad_values(m: Member) -> bytes:
    """NaN and infinity of one rank are in the results at their places, and nowhere else."""
    plain = [m.values(rank).astype(float) for rank in range(m.count)]
    spoiled = [part.copy() for part in plain]
    spoiled[0].flat[0] = np.nan
    spoiled[-1].flat[-1] = np.inf
    own = m.tensor(spoiled[m.rank])
    total, gathered = m.comm.all_reduce(own.clone()), m.comm.all_gather(own.clone(), dim=0)
    for what, result, wanted in (
        ("sum", total, np.sum(spoiled, axis=0)),
        ("gathered", gathered, np.concatenate(spoiled)),
    ):
        found = seen(result)
        wrong = ~((found == wanted) | (np.isnan(found) & np.isnan(wanted)))
        assert not wrong.any(), f"rank {m.rank}: {what} has {found[wrong][0]}, expected {wanted[wrong][0]}"
    return b""


def mesh(m: Member) -> bytes:
    """Collectives along one axis between those along the others, in both orders, as the layers of a model mix them."""
    own = m.mesh.rank
    axes: list[Axis] = [*m.case.axes, *(["ep"] if m.case.joined else [])]  # type: ignore[list-item]
    for step, axis in enumerate([*axes, *reversed(axes)]):
        comm, peers = m.mesh.axis(axis), along(m.case, axis, own)
        assert (comm.rank, comm.size) == (peers.index(own), len(peers)), f"axis {axis}: {comm.rank} of {comm.size}"
        parts = [m.values(rank) + step for rank in peers]
        gathered = comm.all_gather(m.tensor(m.values(own) + step), dim=0)
        m.same(f"gathered along {axis}", gathered, np.concatenate(parts))
        m.same(f"sum along {axis}", comm.all_reduce(m.tensor(m.values(own) + step)), np.asarray(sum(parts)))
        for root, rank in enumerate(peers):
            received = comm.broadcast(m.tensor(m.values(own)), root=root)
            m.same(f"from {root} along {axis}", received, m.values(rank))
    return b""


def along(case: CollectiveCase, axis: Axis, rank: int) -> list[int]:
    """Ranks of the group along an axis, by numpy: ranks laid out in the order of AXES, the last axis fastest."""
    layout = np.arange(case.world).reshape([case.axes.get(name, 1) for name in AXES])
    moving = case.joined if axis == "ep" and case.joined else (axis,)
    place = np.argwhere(layout == rank)[0]
    index = tuple(slice(None) if name in moving else int(place[i]) for i, name in enumerate(AXES))
    return [int(peer) for peer in layout[index].ravel()]


CHECKS: dict[str, Callable[[Member], bytes]] = {
    check.__name__: check
    for check in (all_reduce, all_gather, all_gather_v, reduce_scatter, reduce_scatter_v, all_to_all, all_to_all_v,
                  broadcast, send_recv, send_ahead, barrier, order, close_restore, mesh, experts, graph, kept, many,
                  bad_values)
}  # fmt: skip
"""Each returns bytes that must be the same at every member."""
